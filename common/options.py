"""The command line of every script: a dataclass, a comment per field, and --field=value.

    @dataclass
    class Config:
        steps: int = 300  # optimizer steps                       <- the comment is the help text
        dropout: float = 0.1  # share of the features [0, 1]      <- and may end in a range,
        decay: str = "linear"  # of the rate [linear, sqrt]       <- or in the values to choose from

    config, origin = read_options(Config, sys.argv[1:], PRESETS)

A number without a range is at most 1e9; a whole one is at least 1, any other at least 0.
"""

import contextlib
import difflib
import inspect
import os
import re
import sys
import time
from dataclasses import fields
from decimal import Decimal


class InputError(Exception):
    """Something that the user can correct. Shown as one line without a traceback; exit code 2."""


def cli(main):
    """Calls main(arguments) for a script. What a user can correct is one line on stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name) or open(os.devnull, mode)  # None: the shell closed it
        stream.reconfigure(errors="replace", line_buffering=True)  # what its encoding cannot hold
        setattr(sys, name, stream)
    code, message = 0, ""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        code, message = 130, "interrupted; give the same command again"
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        code = 1
    except (InputError, OSError) as error:  # OSError: a full disk, a missing permission
        code, message = 2, f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}"
    first = os.environ.get("RANK", "0") == "0"
    if code == 2 and not first and "TORCHELASTIC_RUN_ID" in os.environ:
        # Most often all processes fail alike, and the first one says why. torchrun ends all as soon
        # as one has left, so the others wait until it has printed.
        time.sleep(30)
    if message and (first or code == 2):
        print(message, file=sys.stderr)
    if code or "RANK" in os.environ:
        # Python's usual cleanup would write the rest of stdout again, and abort the process where a
        # gloo thread still releases a tensor (torch 2.13).
        os._exit(code)


def split_words(arguments):
    """(words, options): the arguments that do not begin with -, and those that do."""
    words = [argument for argument in arguments if not argument.startswith("-")]
    return words, [argument for argument in arguments if argument.startswith("-")]


def read_options(config_class, arguments, presets=None):
    """(config, origin): all values, and for each "default", "preset NAME" or "option". Options are
    written --key=value, with - or _ within the key; --key alone sets a bool. --help prints all of
    them and exits. Raises InputError for an unknown key and a wrong value."""
    presets, options, texts = presets or {}, {}, {}
    types = {field.name: field.type for field in fields(config_class)}
    for parent in config_class.__mro__[-2::-1]:  # a Config may be a subclass of another one
        texts |= re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(parent), re.M)
    if presets:
        texts["preset"] = f"a named set of values [{', '.join(presets)}]"
    for argument in arguments:
        if argument in ("-h", "--help"):
            print_help(config_class, texts, presets)
            sys.exit(0)
        name, equals, text = argument.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if key not in types or not name.startswith("--"):
            near = difflib.get_close_matches(key, types, 1)
            hint = f"did you mean --{near[0]}=...?" if near else "--help lists all"
            raise InputError(f"{name} is not an option: {hint.replace('_', '-')}")
        if not equals and types[key] is not bool:
            raise InputError(f"{name} needs a value: {name}=...")
        options[key] = parse(name, text if equals else "true", types[key], texts[key])
    preset = options.get("preset", next(iter(presets), None))
    values = presets.get(preset, {})
    origin = dict.fromkeys(types, "default") | dict.fromkeys(values, f"preset {preset}")
    return config_class(**values | options), origin | dict.fromkeys(options, "option")


def parse(name, text, kind, help_text):
    """The value of an option. A whole number may be written 1e3."""
    brackets = re.search(r"\[([^][]+, [^][]+)\]$", help_text)
    if kind in (bool, str):
        choices = "true, false" if kind is bool else brackets and brackets[1]
        if choices and text not in choices.split(", "):
            raise InputError(f"{name}={text}: give {' or '.join(choices.rsplit(', ', 1))}")
        return text if kind is str else text == "true"
    low, high = map(float, brackets[1].split(",")) if brackets else (int(kind is int), 1e9)
    with contextlib.suppress(ArithmeticError, ValueError):  # not a number, or nan
        value = Decimal(text)
        if low <= float(value) <= high and (kind is float or value == int(value)):
            return kind(value)
    number = "whole number" if kind is int else "number"
    raise InputError(f"{name}={text}: give a {number} from {low:,g} to {high:,g}")


def print_help(config_class, texts, presets):
    print(sys.modules[config_class.__module__].__doc__.strip(), "\n\nOptions:")
    for field in fields(config_class):
        values = [f"{name}: {v[field.name]}" for name, v in presets.items() if field.name in v]
        print(f"  --{field.name.replace('_', '-')}={field.type.__name__}  {texts[field.name]}")
        print(f"      default {'; '.join([repr(field.default), *values])}")


def inherit(config, origin, values, checkpoint):
    """Takes over the values that a checkpoint decides, such as the model's shape. Raises InputError
    where an option contradicts one."""
    for key, value in values.items():
        if origin[key] == "option" and getattr(config, key) != value:
            name = f"--{key.replace('_', '-')}"
            raise InputError(f"{name} contradicts {checkpoint}, where it is {value}: leave it out")
        setattr(config, key, value)
        origin[key] = f"from {checkpoint}"
