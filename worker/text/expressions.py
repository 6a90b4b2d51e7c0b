"""Expressions of a Jinja template, evaluated by walking the tree; the values that only templates have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import Undefined, nodes

from .budget import MAX_DEPTH, Budget, OverBudget, TemplateFault
from .filters import FILTERS, GLOBALS, METHODS, TESTS, to_dict
from .operations import BINARY, Lazy, Operation, compare, eager, items_of, pick, text_of

SELECTORS = {"select": (True, False), "reject": (False, False), "selectattr": (True, True), "rejectattr": (False, True)}
"""Filters that keep what passes a test: (the outcome that is kept, whether an attribute is tested)."""


class Scope(dict[str, Any]):
    """Names of one block; others are looked up in the blocks around it."""

    def __init__(self, around: Scope | None, values: Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__(values)
        self.around = around

    def find(self, name: str) -> Any:
        """The value of a name, undefined if no block has it."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope:
                return scope[name]
            scope = scope.around
        return Undefined(name=name)


class Namespace:
    """What `namespace()` makes: the one object a template can change."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


def make_namespace(budget: Budget, given: Any = (), **values: Any) -> Namespace:
    """The function `namespace` of templates."""
    return Namespace(to_dict(budget, given, **values))


class Loop:
    """The variable `loop` of one pass. seen: what the passes of this loop share, for `changed`."""

    def __init__(self, items: list[Any], index: int, seen: list[Any]) -> None:
        count = len(items)
        self.seen = seen
        self.values = {
            "index": index + 1, "index0": index, "revindex": count - index, "revindex0": count - index - 1,
            "first": index == 0, "last": index == count - 1, "length": count,
            "previtem": items[index - 1] if index else Undefined("there is no previous item"),
            "nextitem": items[index + 1] if index + 1 < count else Undefined("there is no next item"),
            "depth": 1, "depth0": 0,
            "cycle": lambda budget, *choices: choices[index % len(choices)],
            "changed": self._changed,
        }  # fmt: skip

    def _changed(self, budget: Budget, *values: Any) -> bool:
        """True if the values are not those of the last call in this loop."""
        budget.weigh([values, *self.seen])
        before, self.seen[:] = self.seen[:], [values]
        return before != [values]


class Macro:
    """A macro or the body of a call block, with the scope that it sees."""

    def __init__(self, node: nodes.Macro | nodes.CallBlock, scope: Scope) -> None:
        self.node = node
        self.scope = scope


class Expressions(ABC):
    """What is evaluated against one budget; the statements of macros are the subclass's."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self.budget = Budget(dict(variables))
        functions: dict[str, Operation] = GLOBALS | {"namespace": make_namespace}
        self.scope = Scope(Scope(None, functions.items()), variables.items())
        self.depth = 0

    @abstractmethod
    def body(self, statements: Sequence[nodes.Node], scope: Scope) -> str:
        """The text of some statements."""

    def evaluate(self, node: nodes.Node, scope: Scope) -> Any:
        """The value of an expression."""
        self.budget.step()
        name = type(node).__name__
        if name in BINARY:
            assert isinstance(node, nodes.BinExpr)
            left, right = self.evaluate(node.left, scope), self.evaluate(node.right, scope)
            return BINARY[name](self.budget, left, right)
        return getattr(self, f"value_{name}")(node, scope)

    def value_Name(self, node: nodes.Name, scope: Scope) -> Any:
        return scope.find(node.name)

    def value_Const(self, node: nodes.Const, scope: Scope) -> Any:
        return node.value

    def value_TemplateData(self, node: nodes.TemplateData, scope: Scope) -> Any:
        return node.data

    def value_Tuple(self, node: nodes.Tuple, scope: Scope) -> Any:
        return tuple(self.evaluate(item, scope) for item in node.items)

    def value_List(self, node: nodes.List, scope: Scope) -> Any:
        return [self.evaluate(item, scope) for item in node.items]

    def value_Dict(self, node: nodes.Dict, scope: Scope) -> Any:
        pairs = [(self.evaluate(pair.key, scope), self.evaluate(pair.value, scope)) for pair in node.items]
        self.budget.weigh([key for key, _ in pairs])
        return dict(pairs)

    def value_CondExpr(self, node: nodes.CondExpr, scope: Scope) -> Any:
        if self.evaluate(node.test, scope):
            return self.evaluate(node.expr1, scope)
        return self.evaluate(node.expr2, scope) if node.expr2 else Undefined("the inline if has no else")

    def value_And(self, node: nodes.And, scope: Scope) -> Any:
        return self.evaluate(node.left, scope) and self.evaluate(node.right, scope)

    def value_Or(self, node: nodes.Or, scope: Scope) -> Any:
        return self.evaluate(node.left, scope) or self.evaluate(node.right, scope)

    def value_Not(self, node: nodes.Not, scope: Scope) -> Any:
        return not self.evaluate(node.node, scope)

    def value_Neg(self, node: nodes.Neg, scope: Scope) -> Any:
        return BINARY["Sub"](self.budget, 0, self.evaluate(node.node, scope))

    def value_Pos(self, node: nodes.Pos, scope: Scope) -> Any:
        return BINARY["Add"](self.budget, 0, self.evaluate(node.node, scope))

    def value_Concat(self, node: nodes.Concat, scope: Scope) -> Any:
        return "".join([text_of(self.budget, self.evaluate(part, scope)) for part in node.nodes])

    def value_Compare(self, node: nodes.Compare, scope: Scope) -> Any:
        left = self.evaluate(node.expr, scope)
        outcome: Any = True
        for operand in node.ops:
            right = self.evaluate(operand.expr, scope)
            outcome = compare(self.budget, operand.op, left, right)
            if not outcome:
                break
            left = right
        return outcome

    def value_Getattr(self, node: nodes.Getattr, scope: Scope) -> Any:
        return self.attribute(self.evaluate(node.node, scope), node.attr)

    def value_Getitem(self, node: nodes.Getitem, scope: Scope) -> Any:
        value = self.evaluate(node.node, scope)
        if isinstance(node.arg, nodes.Slice):
            return self.sliced(value, node.arg, scope)
        key = self.evaluate(node.arg, scope)
        if isinstance(value, dict):
            self.budget.weigh(key)
        if isinstance(value, dict | list | tuple | str) and not isinstance(value, Lazy):
            try:
                return value[key]
            except (LookupError, TypeError):
                pass
        return self.attribute(value, key) if isinstance(key, str) else Undefined(obj=value, name=str(key)[:80])

    def sliced(self, value: Any, node: nodes.Slice, scope: Scope) -> Any:
        """A part of a text or list."""
        if not isinstance(eager(value), str | list | tuple):
            raise TemplateFault(f"a {type(value).__name__} cannot be sliced")
        self.budget.spend(len(value))
        bounds: list[Any] = [part and self.evaluate(part, scope) for part in (node.start, node.stop, node.step)]
        return value[slice(*bounds)]

    def attribute(self, value: Any, name: str) -> Any:
        """A namespace's or loop's attribute, one of the methods of `METHODS`, or a map's value; else undefined."""
        if isinstance(value, Namespace | Loop) and name in value.values:
            return value.values[name]
        method = METHODS.get(type(value), {}).get(name)
        if method is not None:
            return partial(_of_object, method, value)
        if isinstance(value, dict) and name in value and not hasattr(dict, name):
            return value[name]
        if isinstance(value, Undefined):
            raise TemplateFault(f"{value._undefined_name or value._undefined_hint} is undefined")
        return Undefined(obj=value, name=name)

    def value_Call(self, node: nodes.Call, scope: Scope, **extra: Any) -> Any:
        callee = self.evaluate(node.node, scope)
        args = [self.evaluate(arg, scope) for arg in node.args]
        named = {keyword.key: self.evaluate(keyword.value, scope) for keyword in node.kwargs} | extra
        if isinstance(callee, Macro):
            return self.call_macro(callee, args, named)
        if not callable(callee) or isinstance(callee, Undefined):
            raise TemplateFault(f"line {node.lineno} calls what is not one of its functions")
        return callee(self.budget, *args, **named)

    def call_macro(self, macro: Macro, args: list[Any], named: dict[str, Any]) -> str:
        """The text of a macro's body with its arguments."""
        names = [argument.name for argument in macro.node.args]
        inner = Scope(macro.scope, zip(names, args, strict=False))
        inner["caller"] = named.pop("caller", Undefined(name="caller"))
        defaults = macro.node.defaults
        optional = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
        for name in names[len(args) :]:
            given = name in named or name not in optional
            inner[name] = named.pop(name, Undefined(name=name)) if given else self.evaluate(optional[name], inner)
        if named or len(args) > len(names):
            raise TemplateFault("a macro is called with arguments that it does not take")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise OverBudget(f"its macros call each other deeper than {MAX_DEPTH}")
        text = self.body(macro.node.body, inner)
        self.depth -= 1
        return text

    def value_Filter(self, node: nodes.Filter, scope: Scope) -> Any:
        assert node.node is not None
        return self.filtered(node, self.evaluate(node.node, scope), scope)

    def filtered(self, node: nodes.Filter, value: Any, scope: Scope) -> Any:
        """The value after the filter of a node."""
        args = [self.evaluate(arg, scope) for arg in node.args]
        pairs: Iterable[Any] = node.kwargs
        named = {pair.key: self.evaluate(pair.value, scope) for pair in pairs}
        return self.apply_filter(node.name, value, args, named)

    def apply_filter(self, name: str, value: Any, args: list[Any], named: dict[str, Any]) -> Any:
        """The value after the filter of that name."""
        self.budget.step()
        if name == "map" and "attribute" in named:
            default = named.get("default", Undefined(name=str(named["attribute"])))
            found = [pick(item, named["attribute"]) for item in items_of(self.budget, value)]
            return Lazy(default if isinstance(item, Undefined) else item for item in found)
        if name == "map":
            filter_name, *rest = args
            return Lazy(self.apply_filter(filter_name, item, rest, named) for item in items_of(self.budget, value))
        if name in SELECTORS:
            wanted, by_attribute = SELECTORS[name]
            attribute, *rest = args if by_attribute else [None, *args]
            test, *values = rest or ["truthy"]
            items = items_of(self.budget, value)
            return Lazy(item for item in items if self.passes(test, pick(item, attribute), values) == wanted)
        if name not in FILTERS:
            raise TemplateFault(f"the filter {str(name)[:80]} is not supported")
        return FILTERS[name](self.budget, value, *args, **named)

    def value_Test(self, node: nodes.Test, scope: Scope) -> Any:
        value = self.evaluate(node.node, scope)
        return self.passes(node.name, value, [self.evaluate(arg, scope) for arg in node.args])

    def passes(self, name: str, value: Any, args: list[Any]) -> bool:
        """True if the value passes the test of that name."""
        self.budget.step()
        if name == "truthy":
            return bool(value)
        if name not in TESTS:
            raise TemplateFault(f"the test {str(name)[:80]} is not supported")
        return bool(TESTS[name](self.budget, value, *args))


def _of_object(method: Operation, value: Any, budget: Budget, *args: Any, **named: Any) -> Any:
    return method(budget, value, *args, **named)
