"""The command line of every script: a dataclass, a comment per field, and --field=value.

    @dataclass
    class Config:
        steps: int = 300  # optimizer steps                          <- the comment is the help text
        warmup: float = 0.06  # share of the steps [0, 1]            <- and may end in a range

    config, origin = read_options(Config, sys.argv[1:], PRESETS)

Types and ranges are checked, a misspelt key names the nearest one, and `origin` says where each
value came from. A number without a range is at most a billion; a whole one is at least 1, any other
at least 0.
"""

import difflib
import inspect
import os
import re
import sys
import time
from dataclasses import fields
from decimal import Decimal
from pathlib import Path


class InputError(Exception):
    """Something that the user can correct. Shown as one line without a traceback; exit code 2."""


def cli(main):
    """Calls main(arguments) for a script. What a user can correct is one line on stderr."""
    code, message = 0, ""
    try:
        try:
            main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        code, message = 130, "interrupted; give the same command again"
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        code = 1
    except (InputError, OSError) as error:  # OSError: a full disk, a missing permission
        code, message = 2, f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}"
    first = os.environ.get("RANK", "0") == "0"
    if code == 2 and not first:
        # As a rule all processes fail alike, and the first one prints the message. torchrun ends
        # all of them as soon as one has left, so the others wait until it has printed.
        time.sleep(30)
    if message and (first or code == 2):
        print(message, file=sys.stderr, flush=True)
    if code or "RANK" in os.environ:
        # Without Python's usual cleanup, which would write the rest of stdout again, and in which a
        # gloo thread that still releases a tensor would abort the process (torch 2.13).
        os._exit(code)


def split_words(arguments):
    """(words, options): the arguments that do not begin with -, and those that do."""
    words = [argument for argument in arguments if not argument.startswith("-")]
    return words, [argument for argument in arguments if argument.startswith("-")]


def read_options(config_class, arguments, presets=None):
    """(config, origin): all values, and for each "default", "preset NAME" or "option".

    Options are written --key=value, with - or _ within the key; --key alone sets a bool. --help
    prints all of them and exits. Raises InputError for an unknown key and a value of the wrong type
    or out of range."""
    types, given = {f.name: f.type for f in fields(config_class)}, {}
    source = inspect.getsource(config_class)
    texts = dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", source, re.M))
    for argument in arguments:
        if argument in ("-h", "--help"):
            print_help(config_class, texts, presets or {})
            sys.exit(0)
        match = re.fullmatch(r"--([\w-]+)(?:=(.*))?", argument, re.S)
        if not match:
            raise InputError(f"{argument}: options are written --key=value; --help lists them")
        key = match[1].replace("-", "_")
        if key not in types:
            near = difflib.get_close_matches(key, types, 1)
            hint = f"did you mean --{near[0].replace('_', '-')}?" if near else "--help lists all"
            raise InputError(f"--{match[1]} is not an option: {hint}")
        given[key] = parse(match[1], match[2], types[key], texts.get(key, ""))

    values, origin = {}, dict.fromkeys(types, "default")
    if presets:
        preset = given.get("preset", next(iter(presets)))
        if preset not in presets:
            raise InputError(f"--preset={preset}: the presets are {', '.join(presets)}")
        values = presets[preset]
        origin |= dict.fromkeys(values, f"preset {preset}")
    return config_class(**{**values, **given}), origin | dict.fromkeys(given, "option")


def parse(key, text, kind, help_text):
    """The value of an option. A whole number may be written 1e3."""
    if kind is bool:
        if text not in (None, "true", "false"):
            raise InputError(f"--{key}={text}: give true or false")
        return text != "false"
    if text is None:
        raise InputError(f"--{key} needs a value: --{key}=...")
    if kind is str:
        return text
    low, high = range_of(kind, help_text)
    try:
        value = Decimal(text)
        valid = low <= value <= high and (kind is float or value == int(value))
    except ArithmeticError:  # not a number, or nan
        valid = False
    if not valid:
        number = "whole number" if kind is int else "number"
        raise InputError(f"--{key}={text}: give a {number} from {low:,g} to {high:,g}")
    return kind(value)


def range_of(kind, help_text):
    """The smallest and the largest value of a number."""
    match = re.search(r"\[(\S+), (\S+)\]$", help_text)
    return (float(match[1]), float(match[2])) if match else (1 if kind is int else 0, 10**9)


def print_help(config_class, texts, presets):
    print(sys.modules[config_class.__module__].__doc__.strip(), "\n\nOptions:")
    for field in fields(config_class):
        values = [f"{name}: {v[field.name]}" for name, v in presets.items() if field.name in v]
        print(f"  --{field.name.replace('_', '-')}={field.type.__name__}  {texts[field.name]}")
        print(f"      default {'; '.join([repr(field.default), *values])}")


def inherit(config, origin, values, checkpoint):
    """Takes over the values that a checkpoint decides, such as the model's shape.

    Raises InputError where an option contradicts one."""
    for key, value in values.items():
        if origin[key] == "option" and getattr(config, key) != value:
            key = key.replace("_", "-")
            raise InputError(f"--{key} contradicts {checkpoint}, where it is {value}: leave it out")
        setattr(config, key, value)
        origin[key] = f"from {checkpoint}"
