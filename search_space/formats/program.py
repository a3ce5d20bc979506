"""A `torch.export` program that somebody gives, read without executing anything of its file.

`torch.export.load` unpickles what a file asks it to, evaluates the text of its shapes and guards, and calls whatever
function of torch its graph names. So the archive is not given to it. It is looked through and written anew with what a
graph of tensor operations needs and no more: weights as raw bytes, operations of ATen, names that are names. What has
more than that is refused.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mixnas.search_space.errors import ConfigError, IntegrityError, shown, visible
from mixnas.search_space.files import read_bytes

MOST_BYTES = 8 << 30
"""Of a program's file."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,500}")
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,500}")
_OPERATION = re.compile(r"torch\.ops\.(aten|prims|quantized|onednn|mkldnn)\.[A-Za-z_0-9]+\.[A-Za-z_0-9]+")
_SCALAR = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|torch\.sym_(int|float|max|min|not|ite)|math\.(ceil|floor|trunc)"
)
_TOUCHES_FILES = ("from_file", "save", "load")  # of ATen: what it does outside its tensors
_RAW = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_KEPT = ("archive_format", "archive_version", "byteorder", ".data/version")
_LEFT_OUT = ("extra/", "data/sample_inputs/", ".data/")  # nothing of it is needed
_SHAPE = re.compile(r"[A-Za-z0-9_ +\-*/(),=<>&|~]*")
_NOT_TENSORS = ("as_graph", "as_custom_obj", "as_operator")
_WORDS_OF_SHAPES = re.compile(
    r"[su]\d+|Symbol|positive|nonnegative|integer|True|False|Integer|Rational|Mul|Add|Pow|Mod|PythonMod|FloorDiv"
    r"|CleanDiv|CeilToInt|FloorToInt|IntTrueDiv|Max|Min|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Where|ModularIndexing|\d+"
)


def load_program(path: str | Path) -> torch.export.ExportedProgram:
    """Read a program of one tensor to one tensor.

    Args:
        path: A `.pt2` file of `torch.export.save`, or of `nas export --format torch-export`.

    Raises:
        ConfigError: No such file.
        IntegrityError: It is damaged, or holds something that is no tensor operation.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{visible(str(path))}: no such file. Give a .pt2 file of torch.export.save.")
    where = visible(str(path))
    try:
        content = _anew(read_bytes(path, at_most=MOST_BYTES), where)
        return torch.export.load(io.BytesIO(content))
    except IntegrityError:
        raise
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch has no class for all that may be wrong with a file
        reason = visible(" ".join(str(error).split()))[:160] or type(error).__name__
        raise IntegrityError(f"{where}: damaged, or no program of torch.export.save: {reason}.") from error


def _refused(where: str, what: str) -> IntegrityError:
    return IntegrityError(
        f"{where}: {what}, and nothing that a file brings is executed. Give a program of ATen's operations alone: "
        "torch.export.save(torch.export.export(network.eval(), (example,)), 'network.pt2')."
    )


def _anew(content: bytes, where: str) -> bytes:
    """The archive of what was looked at, and of nothing else."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries: dict[str, bytes] = {}
        for info in archive.infolist():
            root, _, name = info.filename.partition("/")
            if name in entries or info.compress_type != zipfile.ZIP_STORED:
                raise _refused(where, f"{shown(info.filename)} stands in it twice, or packed")
            if name.startswith(_LEFT_OUT) and name not in _KEPT:
                continue
            entries[name] = archive.read(info)
    models = [name for name in entries if name.startswith("models/")]
    if models != ["models/model.json"]:
        raise _refused(where, f"it holds {len(models)} programs, not one called model")
    kept: dict[str, bytes] = {}
    for name, data in entries.items():
        if name in _KEPT or _RAW.fullmatch(name):
            kept[name] = data
        elif name == models[0]:
            kept[name] = _checked_model(data, where)
        elif name in ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json"):
            kept[name] = _checked_tensors(data, where)
        else:
            raise _refused(where, f"it holds {shown(name)}")
    kept["data/sample_inputs/model.pt"] = b""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in kept.items():
            archive.writestr(f"{root}/{name}", data)
    return out.getvalue()


def _checked_tensors(data: bytes, where: str) -> bytes:
    """Where the weights or constants lie: raw bytes, by numbered files."""
    plain = json.loads(data)
    for name, entry in plain["config"].items():
        if not _PATH.fullmatch(name) or entry["use_pickle"] is not False or not entry["tensor_meta"]:
            raise _refused(where, f"the tensor {shown(name)} is a pickle")
        if not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
            raise _refused(where, f"{shown(name)} is {shown(entry['path_name'])}, which is no tensor")
    _check_texts(plain, where)
    return json.dumps(plain).encode()


def _checked_model(data: bytes, where: str) -> bytes:
    plain = json.loads(data)
    module = plain["graph_module"]
    if module["graph"]["custom_obj_values"]:
        raise _refused(where, "it holds objects that are no tensors")
    plain["guards_code"] = []  # Python text
    module["metadata"], module["treespec_namedtuple_fields"] = {}, {}
    for node in module["graph"]["nodes"]:
        node["metadata"] = {}  # where its code stood
        target = node["target"]
        known = _OPERATION.fullmatch(target) and not target.split(".")[3].startswith(_TOUCHES_FILES)
        if not known and not _SCALAR.fullmatch(target):
            raise _refused(where, f"it calls {shown(target)}")
    _check_interface(module, where)
    _check_texts(plain, where)
    return json.dumps(plain).encode()


def _check_interface(module: Mapping[str, Any], where: str) -> None:
    """One tensor in and one out, whose specifications are rewritten: parsing them looks classes up."""
    signature = module["signature"]
    inputs = [spec for spec in signature["input_specs"] if "user_input" in spec]
    outputs = [spec for spec in signature["output_specs"] if "user_output" in spec]
    of_tensors = all("as_tensor" in str(spec) for spec in (*inputs, *outputs))
    if len(inputs) != 1 or len(outputs) != 1 or len(signature["output_specs"]) != 1 or not of_tensors:
        raise IntegrityError(
            f"{where}: takes {len(inputs)} inputs and gives {len(signature['output_specs'])} outputs. Give a program "
            "of one tensor to one tensor, exported in evaluation mode."
        )
    (root,) = (entry for entry in module["module_call_graph"] if entry["fqn"] == "")
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    arguments = {"type": "builtins.tuple", "context": "null", "children_spec": [leaf]}
    named = {"type": "builtins.dict", "context": "[]", "children_spec": []}
    spec = {"type": "builtins.tuple", "context": "null", "children_spec": [arguments, named]}
    if json.loads(root["signature"]["in_spec"]) != [1, spec] or json.loads(root["signature"]["out_spec"]) != [1, leaf]:
        raise IntegrityError(f"{where}: does not take one tensor by its place and give one back. Export it so.")
    module["module_call_graph"][:] = [root]


def _check_texts(plain: Any, where: str) -> None:
    """Names are names, and shapes are made of symbols and numbers."""
    for key, text in _texts(plain):
        if key in _NOT_TENSORS:
            raise _refused(where, f"it has {key} {shown(text)}")
        if key == "expr_str":
            bare = re.sub(r"Symbol\('([su]\d+)'", r"Symbol(\1", text)
            words = re.findall(r"[A-Za-z0-9_]+", bare)
            fine = bool(_SHAPE.fullmatch(bare) and all(map(_WORDS_OF_SHAPES.fullmatch, words)))
        elif key in ("name", "as_name", "forward_arg_names", "graph_name", "mutated_inputs"):
            fine = text == "" or bool(_NAME.fullmatch(text))
        elif key in ("parameter_name", "buffer_name", "tensor_constant_name"):
            fine = bool(_PATH.fullmatch(text))
        else:
            continue
        if not fine:
            raise _refused(where, f"{key} is {shown(text)}")


def _texts(plain: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text, by the key under which it stands; keys that name a tensor or a symbol, as its name."""
    if isinstance(plain, str):
        yield key, plain
    elif isinstance(plain, Mapping):
        for inner, value in plain.items():
            if key in ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"):
                yield "name", inner
            if inner in _NOT_TENSORS:
                yield inner, "of its own"
            yield from _texts(value, inner)
    elif isinstance(plain, list):
        for value in plain:
            yield from _texts(value, key)
