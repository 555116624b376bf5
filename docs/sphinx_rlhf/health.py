"""The health checks as a guide to troubleshooting, from the table that `rlhf-monitor --check` goes through.

A page gives the symptom in its own words; evidence, thresholds, cause and remedy come from the checks themselves.
"""

import inspect
import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from rlhf.metrics import METRICS
from rlhf.monitor.health import CHECKS, Check
from rlhf.monitor.thresholds import THRESHOLDS

from .docstrings import inline

_BY_NAME = {check.name: check for check in CHECKS}


def setup(app: Sphinx) -> None:
    """Register the object type and the directives."""
    app.add_object_type("check", "check", objname="health check")
    app.add_directive("health-check", _HealthCheck)
    app.add_directive("other-health-checks", _OtherHealthChecks)


class _HealthCheck(SphinxDirective):
    """```{health-check} name```: the content is the symptom."""

    required_arguments, has_content = 1, True

    def run(self) -> list[nodes.Node]:
        check = _BY_NAME[self.arguments[0]]
        self.env.temp_data.setdefault("rlhf_checks", set()).add(check.name)
        return self.parse_text_to_nodes(_markdown(check, "\n".join(self.content)))


class _OtherHealthChecks(SphinxDirective):
    """The checks that have no symptom on the page yet."""

    def run(self) -> list[nodes.Node]:
        shown = self.env.temp_data.get("rlhf_checks", set())
        parts = [_markdown(check, _summary(check)) for check in CHECKS if check.name not in shown]
        return self.parse_text_to_nodes("\n\n".join(parts)) if parts else []


def _summary(check: Check) -> str:
    return inspect.getdoc(check.measure).split("\n\n")[0].replace("Return the", "Looks at the", 1)


def _markdown(check: Check, symptom: str) -> str:
    judged = [key for key, metric in METRICS.items() if check.name in metric.checks]
    evidence = (
        ", ".join(f"{{metric}}`{key}`" for key in (*judged, *check.beside)) or "completions and events of the log"
    )
    found = re.findall(r'"([\w-]+)"', inspect.getsource(check.measure))
    limits = [
        f"- {name}: warning at {limit.warning:g}, problem at {limit.problem:g} ({inline(limit.source, lambda _: None)})"
        for name, limit in THRESHOLDS.items()
        if name in found
    ]
    return "\n".join(
        (
            f":::{{check}} {check.name}",
            f"**Symptom.** {symptom}",
            "",
            f"**Evidence.** {evidence}.",
            "",
            *limits,
            "",
            f"**Usual cause.** {_sentence(check.cause)}",
            "",
            f"**Remedy.** {_sentence(check.advice)}",
            ":::",
        )
    )


def _sentence(text: str) -> str:
    shown = inline(text, lambda _: None)
    shown = re.sub(r"(--[\w.-]+\w(?: (?:\d[\d.]*|true|false|separate|fp32)\b)?)", r"`\1`", shown)
    return shown[0].upper() + shown[1:] + "."
