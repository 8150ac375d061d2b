"""The command line of every script: a dataclass, a comment per field, and --field=value.

    @dataclass
    class Config:
        steps: int = 300  # optimizer steps          <- the comment is the help text

    config, origin = read_options(Config, sys.argv[1:])

It replaces a config framework: types are checked, a misspelt key names the nearest one, and every
value can say where it is from.
"""

import difflib
import inspect
import os
import re
import sys
from dataclasses import fields
from pathlib import Path


class InputError(Exception):
    """Something that the user can mend. Shown as one line without a traceback; exit code 2."""


def run(main):
    """Calls main() with the command line, and shows an InputError as one line on stderr."""
    try:
        main(sys.argv[1:])
        if "RANK" in os.environ:
            leave()
    except InputError as error:
        if int(os.environ.get("RANK", 0)) == 0:  # of several processes, one speaks
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "\nstopped; a stage continues from its last checkpoint with --resume", file=sys.stderr
        )
        sys.exit(130)


def leave():
    """Ends one of several processes, when it is done, without taking the interpreter apart: a
    thread of gloo that lets go of a tensor after that would abort the process (torch 2.13)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def help_texts(config_class):
    """field -> the comment behind it."""
    return dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(config_class), re.M))


def read_options(config_class, arguments, presets=None):
    """(config, origin): the values of the fields, and for each where it is from: "default", "preset
    NAME" or "option".

    Options are --key=value, with - or _ within the key; --key alone sets a bool. --help prints all
    and ends the program. Raises InputError for a key that does not exist, naming the nearest one,
    and for a value of the wrong type."""
    types = {field.name: field.type for field in fields(config_class)}
    given = {}
    for argument in arguments:
        if argument in ("-h", "--help"):
            print_help(config_class, presets or {})
            sys.exit(0)
        match = re.fullmatch(r"--([\w-]+)(?:=(.*))?", argument, re.S)
        if not match:
            raise InputError(f"{argument}: options are written --key=value; --help lists them")
        key, value = match[1].replace("-", "_"), match[2]
        if key not in types:
            near = difflib.get_close_matches(key, types, 1)
            hint = f"did you mean --{near[0].replace('_', '-')}?" if near else "--help lists all"
            raise InputError(f"--{match[1]} is not an option: {hint}")
        given[key] = parse(match[1], value, types[key])

    values, origin = {}, dict.fromkeys(types, "default")
    if presets:
        preset = given.get("preset", next(iter(presets)))
        if preset not in presets:
            raise InputError(f"--preset={preset}: the presets are {', '.join(presets)}")
        values = presets[preset]
        origin.update(dict.fromkeys(values, f"preset {preset}"))
    origin.update(dict.fromkeys(given, "option"))
    return config_class(**{**values, **given}), origin


def parse(key, text, kind):
    """The value of an option. An int may be written 1e3; a bool may stand without a value."""
    if kind is bool:
        known = {None: True, "true": True, "1": True, "false": False, "0": False}
        if text not in known:
            raise InputError(f"--{key}={text}: give true or false")
        return known[text]
    if text is None:
        raise InputError(f"--{key} needs a value: --{key}=...")
    try:
        if kind is int and not re.fullmatch(r"[+-]?\d+", text):
            number = float(text)
            if number != int(number):
                raise ValueError
            return int(number)
        return kind(text)
    except (ValueError, OverflowError):
        wanted = "a whole number" if kind is int else "a number"
        raise InputError(f"--{key}={text}: not {wanted}") from None


def print_help(config_class, presets):
    print(sys.modules[config_class.__module__].__doc__.strip(), "\n\nOptions:")
    texts = help_texts(config_class)
    for field in fields(config_class):
        values = [f"{name}: {v[field.name]}" for name, v in presets.items() if field.name in v]
        print(f"  --{field.name.replace('_', '-')}={field.type.__name__}  {texts[field.name]}")
        print(f"      [{'; '.join([str(field.default), *values])}]")


def inherit(config, origin, values, where):
    """Takes over what the checkpoint `where` decides, such as the model's shape.

    Raises InputError where an option contradicts it."""
    for key, value in values.items():
        if origin[key] == "option" and getattr(config, key) != value:
            key = key.replace("_", "-")
            raise InputError(f"--{key} contradicts {where}, where it is {value}: leave it out")
        setattr(config, key, value)
        origin[key] = f"from {where}"
