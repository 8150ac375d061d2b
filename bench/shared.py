"""What the benches share: the stages by name, tables in Markdown, lists of numbers."""

import re

import torch

import contrastive
import finetune
import mlm
from common.device import best_device, device_name
from common.options import InputError

STAGES = {"mlm": mlm, "contrastive": contrastive, "finetune": finetune}


def print_table(*about, rows):
    """Prints the machine and `about` in a line, then a table of which the first row is the head."""
    machine = (f"torch {torch.__version__}", device_name(best_device()))
    print("", ", ".join([*machine, *about]), "", sep="\n", flush=True)
    for number, cells in enumerate(rows):
        rule = ["---", *["---:"] * (len(cells) - 1)]
        for line in [cells] if number else [cells, rule]:
            print(f"| {' | '.join(line)} |", flush=True)


def whole_numbers(text):
    """ "8,32" -> [8, 32]. Raises InputError for anything else."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text, re.ASCII):
        raise InputError(f"{text}: give whole numbers with commas between them")
    return [int(number) for number in text.split(",")]
