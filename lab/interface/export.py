"""Export a finished run as a folder for other tools: weights, tokenizer, configuration and the code of the model.

mlx-lm loads it through `model_file` in config.json; `tokenizers` and transformers load the tokenizer; any safetensors
reader loads the weights. The folder needs neither this project nor the prepared data. The export runs no code of the
run.
"""

import ast
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from lab import MOVED
from lab.data.tokens import BOS, Tokenizer
from lab.errors import UserError, one_line
from lab.files import ROOT
from lab.interface.sample import records, result
from lab.loop.source import constants
from lab.preset import from_dict

MODEL = '''"""The model for mlx-lm (config.json: model_file) and for your own programs: `from model import load`."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER))  # for its lab/

from lab.interface import exported
from lab.interface.exported import ModelArgs


def Model(args):
    return exported.Exported(FOLDER, args)


def load():
    """The model with its weights: tokens (B, T) int32 to logits (B, T, V) float32."""
    return exported.load(FOLDER)
'''

README = """# {name}

{score}
A language model of {parameters} with a context of {context} tokens and a vocabulary of {vocabulary}, trained by
`train.py`.

```sh
pip install mlx-lm          # Linux: pip install 'mlx[cpu]' mlx-lm threadpoolctl
mlx_lm.generate --model . --trust-remote-code --temp 0 --prompt 'Once upon a time'
```

`--trust-remote-code` runs `model.py` and `train.py` from this folder: read them first if they are not yours. There is
no key-value cache: every token needs a pass over the whole context. mlx-lm drops a space at the start of its answer.

In a program started in this folder:

```python
from model import load
from tokenizers import Tokenizer
import mlx.core as mx

model, tokenizer = load(), Tokenizer.from_file("tokenizer.json")
ids = tokenizer.encode("Once upon a time").ids
for _ in range(100):
    ids.append(mx.argmax(model(mx.array([ids]))[0, -1]).item())
    if ids[-1] == {bos}:
        break
print(tokenizer.decode(ids))
```

- `model.safetensors`: the weights ({dtypes}) under the names of `train.py`'s modules.
- `tokenizer.json`: byte-level BPE{merges}, for `tokenizers` and `transformers.AutoTokenizer`.
  `{token}` marks the start and the end of every text; other tools also treat it as special inside a text.
- `config.json`: `settings` are the values that `train.py` reads, `constants` its own, such as learning rates.
- `model.py`, `lab/`: the code that `train.py` needs to build the model.
"""


def export(run_dir: Path, folder: Path) -> None:
    """Write the folder completely or not at all. Raises UserError if it exists or the run is incomplete."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists; choose a new folder")
    settings, tokenizer = records(run_dir)
    folder = folder.resolve()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        (temporary / "lab").mkdir(parents=True)
        _fill(temporary, run_dir, settings, tokenizer, folder.name)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(folder: Path, run_dir: Path, settings: dict[str, Any], tokenizer: Tokenizer, name: str) -> None:
    source = (run_dir / "train.py").read_text(encoding="utf-8")
    config = configuration(source, settings, tokenizer) | score(run_dir)
    shutil.copyfile(run_dir / "checkpoint.safetensors", folder / "model.safetensors")
    (folder / "train.py").write_text(source, encoding="utf-8")
    (folder / "model.py").write_text(MODEL, encoding="utf-8")
    for module in imported_files(source + MODEL):
        copy = folder / module.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, copy)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / "tokenizer.json").write_text(portable_tokenizer(tokenizer), encoding="utf-8")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": BOS}
    kind |= {"model_max_length": config["max_position_embeddings"], "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind, indent=1), encoding="utf-8")
    (folder / "README.md").write_text(readme(name, config, folder / "model.safetensors", tokenizer), encoding="utf-8")


def configuration(source: str, settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json: the keys that mlx-lm and transformers need, the settings of train.py, and its constants."""
    preset = from_dict(settings["preset"])
    own = constants(source, preset.settings())
    return {
        "model_type": "autoresearch",
        "model_file": "model.py",
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": preset.task.sequence_length,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.bos,
        "preset": preset.name,
        "settings": preset.settings(),
        "constants": {name: constant.value for name, constant in own.items()},
    }


def score(run_dir: Path) -> dict[str, Any]:
    """val_bpb and task of the run, None if it has no score."""
    scored = result(run_dir)
    return {key: scored.get(key) for key in ("val_bpb", "task")}


def imported_files(source: str) -> list[Path]:
    """The files of lab/ that this source imports, directly or through others."""
    files, unread = {ROOT / "lab" / "__init__.py"}, [source]
    while unread:
        named = {name for node in ast.walk(ast.parse(unread.pop())) for name in _imported(node)}
        modules = {ROOT / MOVED.get(name, name).replace(".", "/") for name in named if name.startswith("lab.")}
        paths = {file for path in modules for file in (path.with_suffix(".py"), path.parent / "__init__.py")}
        new = {file for file in paths if file.is_file()} - files
        files |= new
        unread += [file.read_text(encoding="utf-8") for file in new]
    return sorted(files)


def _imported(node: ast.AST) -> list[str]:
    """Modules that a statement may import, by their full names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def portable_tokenizer(tokenizer: Tokenizer) -> str:
    """tokenizer.json that adds the special token before every text, as in training."""
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    pair = f"{BOS} $A {BOS} $B"
    inner.post_processor = TemplateProcessing(single=f"{BOS} $A", pair=pair, special_tokens=[(BOS, tokenizer.bos)])
    return inner.to_str(pretty=True)


def header(weights: Path) -> list[dict[str, Any]]:
    """Shape and dtype of every tensor of a safetensors file."""
    with open(weights, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return [tensor for name, tensor in json.loads(file.read(size)).items() if name != "__metadata__"]


def title(name: str) -> str:
    """The name of a folder, which may hold any bytes, as a heading."""
    return one_line(name) or "Exported model"


def readme(name: str, config: dict[str, Any], weights: Path, tokenizer: Tokenizer) -> str:
    is_scored, tensors = config["val_bpb"] is not None, header(weights)
    return README.format(
        name=title(name),
        score=f"val_bpb {config['val_bpb']:.6f} bits per byte, task `{config['task']}`.\n"
        if is_scored
        else "Not scored.\n",
        parameters=f"{sum(math.prod(tensor['shape']) for tensor in tensors) / 1e6:.2f}M parameters",
        dtypes=", ".join(sorted({tensor["dtype"] for tensor in tensors})),
        context=config["max_position_embeddings"],
        vocabulary=f"{tokenizer.vocab_size:,}",
        bos=tokenizer.bos,
        token=BOS,
        merges=" without merges: its tokens are the 256 bytes" if tokenizer.is_bytes else "",
    )
