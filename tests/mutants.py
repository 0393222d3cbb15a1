"""Faults put into a function's source by hand, which the numbers must tell."""

import __future__

import inspect
import textwrap


def changed(function, old, new, path):
    """Return the function, compiled from its source with `old` replaced by `new`.

    Args:
        function: of a module or a class.
        old: part of its source, there once.
        new: what stands there instead.
        path: a file for the changed source, from which it can be read again.
    """
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} is in the source {source.count(old)} times"
    path.write_text(source.replace(old, new), encoding="utf-8")
    names = dict(function.__globals__)
    annotations = __future__.annotations.compiler_flag
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec", annotations), names)
    return names[function.__name__]
