"""What a method's source says, as text: a class is told by its code, not by its name."""

import ast
import inspect
import textwrap
from collections.abc import Sequence
from functools import cache
from types import FunctionType


def code_of(cls: type, method: str = "forward") -> str | None:
    """The body of a method as text, without docstring and annotations, its first argument named x up to the first
    statement that binds it anew; None where there is no source."""
    return _code_of(getattr(cls, method, None))


@cache
def _code_of(function) -> str | None:
    if hasattr(function, "__wrapped__"):  # what wraps it computes something else
        return None
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) < 2:
        return None
    name, body = function.args.args[1].arg, function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                node.id = "x"
        if any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store) for n in ast.walk(statement)):
            break
    return "\n".join(map(ast.unparse, body))


def unwrapped(function):
    """A layer's forward below the wrapper by which transformers checkpoints it."""
    inner = getattr(function, "__wrapped__", None)
    if inner is not None and function.__code__.co_name == "forward_with_checkpointing":
        return unwrapped(inner)
    return function


def replaced(function, statements: Sequence[str], by: str) -> FunctionType | None:
    """The function with these statements, one after another on the top level of its body, replaced by another one; None
    where they do not stand there once, or the source is not what runs."""
    try:
        source, first_line = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(source)))
    except (OSError, TypeError, SyntaxError):
        return None
    (definition,) = tree.body
    # what wraps it computes something else, and a closure cannot be made again from text
    if hasattr(function, "__wrapped__") or function.__closure__ or not isinstance(definition, ast.FunctionDef):
        return None
    if definition.decorator_list:
        return None
    count, texts = len(statements), [ast.unparse(statement) for statement in definition.body]
    found = [i for i in range(len(texts)) if texts[i : i + count] == list(statements)]
    if len(found) != 1:
        return None
    (statement,) = ast.parse(by).body
    for node in ast.walk(statement):
        ast.copy_location(node, definition.body[found[0]])
    definition.body[found[0] : found[0] + count] = [statement]
    # the signature is the function's own: its annotations may be names that are gone
    for arg in ast.walk(definition.args):
        if isinstance(arg, ast.arg):
            arg.annotation = None
    definition.args.defaults = [ast.Constant(None) for _ in definition.args.defaults]
    definition.args.kw_defaults = [d and ast.Constant(None) for d in definition.args.kw_defaults]
    definition.returns = None
    ast.fix_missing_locations(ast.increment_lineno(tree, first_line - 1))
    made: dict = {}
    exec(compile(tree, function.__code__.co_filename, "exec"), function.__globals__, made)
    new = made[definition.name]
    new.__defaults__, new.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    new.__qualname__, new.__module__ = function.__qualname__, function.__module__
    return new
