"""Triton's interpreter, without what it does again and again: for tests and dry runs, which spend their time in it."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np


def prepare_once() -> None:
    """Let the interpreter prepare the language once a launch, and not for each function that a kernel calls.

    It looks through all names of the language for what is built in, and finds, within a launch, that everything is
    prepared already: half of the time that some kernels take. The types of NumPy, of which it makes a table at each
    question, are kept by name. Nothing that is computed changes.
    """
    from triton.runtime import interpreter as of_triton

    interpreter: Any = of_triton
    prepare, dtype_of = interpreter._patch_lang, interpreter._get_np_dtype
    scopes, language = interpreter._LangPatchScope, interpreter.tl
    restore = scopes.restore
    prepared: set[str] = set()
    seen: dict[Callable[..., Any], set[str]] = {}
    dtypes: dict[str, np.dtype] = {}

    def prepare_what_is_not(function: Callable[..., Any]) -> Any:
        if function not in seen:
            modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
            seen[function] = {module.__name__ for module in modules if module in (language, language.core)}
        if seen[function] and seen[function] <= prepared:
            return scopes()
        scope = prepare(function)
        prepared.update(seen[function])
        return scope

    def restore_all(scope: Any) -> None:
        restore(scope)
        prepared.clear()

    def known_dtype(of: Any) -> np.dtype:
        of = of.element_ty if isinstance(of, language.block_type) else of
        if isinstance(of, language.pointer_type):
            return dtype_of(of)
        if of.name not in dtypes:
            dtypes[of.name] = dtype_of(of)
        return dtypes[of.name]

    interpreter._patch_lang, scopes.restore, interpreter._get_np_dtype = prepare_what_is_not, restore_all, known_dtype
