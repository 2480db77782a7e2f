"""The first lines of a process that stands for a user's: it cannot import this repository."""

# The packages cannot be imported under their own names; remote code runs under `transformers_modules.`.
NO_REPOSITORY = """
import sys


class NoRepository:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_amvl", "trainer", "model_cards", "recipes"):
            raise ImportError(f"`{name}` is not installed here")


sys.meta_path.insert(0, NoRepository())
for name in ("modeling_amvl", "trainer"):
    try:
        __import__(name)
    except ImportError as error:
        assert "is not installed here" in str(error)
    else:
        raise SystemExit(f"{name} could be imported")
"""
