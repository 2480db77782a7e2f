"""What the benchmark scripts share: ratios within rounds, tables, and what machine they ran on."""

import os
import platform
import statistics
from pathlib import Path

import torch
import transformers


def ratios(seconds, name, baseline):
    """Median, least and largest of the ratios within rounds."""
    paired = [mine / base for mine, base in zip(seconds[name], seconds[baseline], strict=True)]
    return statistics.median(paired), min(paired), max(paired)


def spread(values, digits=2):
    return "{:.{digits}f} ({:.{digits}f}-{:.{digits}f})".format(*values, digits=digits)


def render(table, markdown):
    """A title and its table: columns two spaces apart, or Markdown."""
    title, header, rows = table
    texts = [[str(word) for word in row] for row in [header, *rows]]
    widths = [max(2, *map(len, column)) for column in zip(*texts)]
    lines = []
    for row in texts:
        words = [word.rjust(width) for word, width in zip(row, widths)]
        lines.append(f"| {' | '.join(words)} |" if markdown else "  ".join(words).rstrip())
    rule = [f"{'-' * (width - 1)}:" if markdown else "-" * width for width in widths]
    lines.insert(1, f"| {' | '.join(rule)} |" if markdown else "  ".join(rule))
    return "\n".join([f"**{title}**\n" if markdown else title, *lines, ""])


def machine_facts():
    """The processor, and the versions of what was measured."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":")[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": f"{processor}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def facts_line(facts):
    """Machine and versions in a line; `gpu`, if there is one, instead of the processor."""
    return (
        f"{facts.get('gpu') or facts['cpu']}; {facts['threads']} threads, load average {facts['load_average']:.1f} at the start; "
        f"torch {facts['torch']}, transformers {facts['transformers']}, Python {facts['python']}"
    )


def markdown_page(title, command, facts, tables):
    """The page that a benchmark writes: its command, what it ran on, its tables."""
    head = f"# {title}\n\nPrinted by `{command}`, whose docstring says what is compared.\n"
    return "\n".join([head, facts.replace("\n", "; ") + "\n", *(render(table, markdown=True) for table in tables)])
