"""Runs a parsed Jinja template by walking its tree: nothing is compiled, and every node and character is paid for.

Jinja's own sandbox bounds neither time nor memory (`'a' * 10**9`, `'%1000000000d'`, nested loops, `a ~ a` forty times),
so only its parser is used here. A node without a method here or in `Expressions` is refused when the template loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import UndefinedError

from .budget import OverBudget, TemplateFault
from .expressions import Expressions, Loop, Macro, Namespace, Scope
from .operations import items_of, text_of

MISTAKES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, UndefinedError)
"""What Python raises when a template uses a value wrongly."""


class Break(Exception):
    """Ends the innermost loop."""


class Continue(Exception):
    """Ends one pass of the innermost loop."""


class Interpreter(Expressions):
    """One rendering of one template."""

    def render(self, template: nodes.Template) -> str:
        """The text of the template. Raises TemplateFault."""
        try:
            return self.body(template.body, self.scope)
        except MISTAKES as error:
            raise TemplateFault(str(error)[:500]) from error
        except RecursionError as error:
            raise OverBudget("it is nested too deeply") from error

    def body(self, statements: Sequence[nodes.Node], scope: Scope) -> str:
        """The text of some statements."""
        out: list[str] = []
        self.run(statements, scope, out)
        return "".join(out)

    def run(self, statements: Sequence[nodes.Node], scope: Scope, out: list[str]) -> None:
        """Execute statements, appending their text to `out`."""
        for node in statements:
            self.budget.step()
            getattr(self, f"run_{type(node).__name__}")(node, scope, out)

    def run_Output(self, node: nodes.Output, scope: Scope, out: list[str]) -> None:
        for part in node.nodes:
            out.append(text_of(self.budget, self.evaluate(part, scope)))

    def run_If(self, node: nodes.If, scope: Scope, out: list[str]) -> None:
        for branch in (node, *node.elif_):
            if self.evaluate(branch.test, scope):
                return self.run(branch.body, scope, out)
        self.run(node.else_, scope, out)

    def run_For(self, node: nodes.For, scope: Scope, out: list[str]) -> None:
        items = items_of(self.budget, self.evaluate(node.iter, scope))
        if node.test is not None:
            items = [item for item in items if self.evaluate(node.test, self.bound(node.target, item, scope))]
        seen: list[Any] = []
        for index, item in enumerate(items):
            self.budget.step()
            inner = self.bound(node.target, item, scope)
            inner["loop"] = Loop(items, index, seen)
            try:
                self.run(node.body, inner, out)
            except Continue:
                continue
            except Break:
                break
        if not items:
            self.run(node.else_, Scope(scope), out)

    def run_Break(self, node: nodes.Break, scope: Scope, out: list[str]) -> None:
        raise Break

    def run_Continue(self, node: nodes.Continue, scope: Scope, out: list[str]) -> None:
        raise Continue

    def run_Assign(self, node: nodes.Assign, scope: Scope, out: list[str]) -> None:
        self.assign(node.target, self.evaluate(node.node, scope), scope)

    def run_AssignBlock(self, node: nodes.AssignBlock, scope: Scope, out: list[str]) -> None:
        text: Any = self.body(node.body, Scope(scope))
        self.assign(node.target, self.filtered(node.filter, text, scope) if node.filter else text, scope)

    def run_FilterBlock(self, node: nodes.FilterBlock, scope: Scope, out: list[str]) -> None:
        out.append(text_of(self.budget, self.filtered(node.filter, self.body(node.body, Scope(scope)), scope)))

    def run_With(self, node: nodes.With, scope: Scope, out: list[str]) -> None:
        inner = Scope(scope)
        for target, value in zip(node.targets, node.values, strict=True):
            self.assign(target, self.evaluate(value, scope), inner)
        self.run(node.body, inner, out)

    def run_Scope(self, node: nodes.Scope, scope: Scope, out: list[str]) -> None:
        self.run(node.body, Scope(scope), out)

    def run_Macro(self, node: nodes.Macro, scope: Scope, out: list[str]) -> None:
        scope[node.name] = Macro(node, scope)

    def run_CallBlock(self, node: nodes.CallBlock, scope: Scope, out: list[str]) -> None:
        caller = Macro(node, scope)
        out.append(text_of(self.budget, self.value_Call(node.call, scope, caller=caller)))

    def bound(self, target: nodes.Node, value: Any, scope: Scope) -> Scope:
        """A new scope in which the target has the value."""
        inner = Scope(scope)
        self.assign(target, value, inner)
        return inner

    def assign(self, target: nodes.Node, value: Any, scope: Scope) -> None:
        """Give a value to a name, to several at once, or to a namespace's attribute."""
        if isinstance(target, nodes.Name):
            scope[target.name] = value
        elif isinstance(target, nodes.NSRef):
            space = scope.find(target.name)
            if not isinstance(space, Namespace):
                raise TemplateFault(f"{target.name} is not a namespace")
            space.values[target.attr] = value
        elif isinstance(target, nodes.Tuple):
            for part, item in zip(target.items, items_of(self.budget, value), strict=True):
                self.assign(part, item, scope)
