"""Writes docs/settings.md from the declarations: ``python docs/settings_page.py > docs/settings.md``."""

from __future__ import annotations

import re
import sys

from torchmgmt.http.command_line import EXIT_CODES
from torchmgmt.setting_kinds import Declaration
from torchmgmt.setting_sources import ALWAYS_IN_ENVIRONMENT, NOT_OURS
from torchmgmt.settings import declarations

HEAD = """\
# Settings

<!-- Made by docs/settings_page.py from the declarations in torchmgmt/settings.py; a test holds it current. -->

The server `python -m torchmgmt.http` takes each setting from the first of these that has it:

1. the environment, as `TS_<NAME>`, if `enable_envvars_config` is true (without that only {always});
2. the command line;
3. the configuration file: the one in the environment variable `TS_CONFIG_FILE`, else that of `--ts-config`, else
   `config.properties` in the working directory;
4. the default.

A blank value is as if nothing were there. The file follows the rules of Java's properties: comments begin with `#` or
`!`; `=`, `:` or a blank ends the key; `\\` at the end continues a line; `\\uXXXX` is a character. `$$NAME$$` in a value is
replaced by the environment variable of that name. A wrong value ends the start with its file, line and name; an unknown
key is kept in `Settings.other_keys`, with a warning. A program that embeds the library reads the same file:

```python
from torchmgmt import ModelManager, Settings

manager = ModelManager(settings=Settings.from_file("config.properties"))
```

"""

MODELS = """
## Parameters of single versions

`models` gives a version what neither the call that registers it nor the archive's `model-config.yaml` says, by the keys of
the latter. `defaultVersion` makes it the default once it is registered; `marName` has no effect.

```properties
models={\\
  "noop": {\\
    "1.0": {\\
      "defaultVersion": true, "marName": "noop.mar",\\
      "minWorkers": 1, "maxWorkers": 2, "batchSize": 4, "maxBatchDelay": 100, "responseTimeout": 120\\
    }\\
  }\\
}
```
"""

NOT_OURS_HEAD = """
## TorchServe's others

These keys of a `config.properties` are accepted with a warning and have no effect.

| Key | Why |
|---|---|
"""


EXIT_CODES_HEAD = """
## Exit codes

| Code | Of `python -m torchmgmt.http` |
|---|---|
"""


def settings_page() -> str:
    """Return the page."""
    always = ",\n   ".join(f"`TS_{name.upper()}`" for name in sorted(ALWAYS_IN_ENVIRONMENT))
    rows = [_row(declaration) for declaration in declarations()]
    table = "| Setting | Values | Default | Flags | Meaning |\n|---|---|---|---|---|\n" + "".join(rows)
    others = "".join(f"| `{key}` | {why} |\n" for key, why in sorted(NOT_OURS.items()))
    codes = "".join(f"| {code} | {what} |\n" for code, what in EXIT_CODES.items())
    return HEAD.format(always=always) + table + MODELS + NOT_OURS_HEAD + others + EXIT_CODES_HEAD + codes


def _row(declaration: Declaration) -> str:
    metavar = declaration.kind.metavar.replace("|", " \\| ")
    default = f"`{declaration.default_text}`" if declaration.default_text else ""
    flags = ", ".join(f"`{flag}`" for flag in declaration.all_flags)
    flags += "".join(f"; false: `{flag}`" for flag in declaration.flags_for_false)
    meaning = re.sub(r"([|*<])", r"\\\1", declaration.help)
    if declaration.unit:
        meaning += f" Unit: {declaration.unit}."
    if declaration.without_effect:
        meaning += f" *No effect in this release: {declaration.without_effect}.*"
    return f"| `{declaration.name}` | {metavar} | {default} | {flags} | {meaning} |\n"


if __name__ == "__main__":
    sys.stdout.write(settings_page())
