"""All that is particular to a family, as data; everything else comes from a family's own generation methods."""

POSITIONS_FROM_PADDING_ID = ("kosmos-2", "kosmos-2.5")  # tokens count on from it, padding has it as its position
ENCODED_IMAGES = {"kosmos-2": "image_embeds"}  # an output of the prompt that every later forward asks for
IMAGES_IN_A_ROW = {"idefics": "image_hidden_states"}  # kept from the prompt, those of a row next to each other
REQUIRED_IN_TRAINING = {"molmo2": "mm_token_type_ids"}  # in later forwards too, for which it is left out
CACHES_IMAGES = ("mllama",)  # keys of the image stand where other layers keep those of the tokens
CROSS_ATTENDING = ("blip",)  # the decoder attends to the image, whose keys are no part of the prompt's cache

# Listed as models that answer about images in text, and refused: they predict no next token.
NO_NEXT_TOKEN = {"diffusion_gemma": "denoises a block of tokens at a time"}

# Found out by trying: with a cache of fixed size most of them fail in their stock forward, too, and `unlimited_ocr`, which keeps
# a prompt apart from what follows, answers otherwise.
NO_STATIC_CACHE = (
    *("blip", "blip-2", "git", "inkling2", "inkling2_loop", "inkling_mm_model"),
    *("instructblip", "instructblipvideo", "kosmos-2", "unlimited_ocr"),
)
# Likewise: they read their images whole, let the tokens of an image look ahead, or fail.
NO_CHUNKED_PREFILL = (
    *(
        "blip",
        "blip-2",
        "fuyu",
        "gemma3",
        "gemma4",
        "gemma4_unified",
        "git",
        "granite4_vision",
        "idefics",
        "instructblip",
    ),
    *(
        "instructblipvideo",
        "kosmos-2",
        "kosmos-2.5",
        "llama4",
        "mllama",
        "molmo2",
        "ovis2",
        "paligemma",
        "shieldgemma2",
    ),
)
