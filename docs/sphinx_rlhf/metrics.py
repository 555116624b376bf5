"""Metrics as objects `metric` with a role of that name, from the table that log, page and plots read."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from rlhf.metrics import METRICS, Metric
from rlhf.stages import STAGES, load_program

from .docstrings import inline


def setup(app: Sphinx) -> None:
    """Register the object type and the directives."""
    for stage in STAGES.values():  # whose modules may register metrics
        load_program(stage)
    app.add_object_type("metric", "metric", objname="metric")
    app.add_directive("metric-table", _MetricTable)
    app.add_directive("metrics-of", _MetricsOf)


class _MetricTable(SphinxDirective):
    """All metrics, each as an object that the role `metric` links to."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(
            "\n\n".join(f":::{{metric}} {m.key}\n{_body(m)}\n:::" for m in METRICS.values())
        )


class _MetricsOf(SphinxDirective):
    """```{metrics-of}``` with keys as its content: what each should look like, and what else it means."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        parts = []
        for key in " ".join(self.content).split():
            metric = METRICS[key]
            unit = f", {metric.unit}" if metric.unit else ""
            parts.append(f"{{metric}}`{key}`{unit}\n: {_text(metric)}")
        return self.parse_text_to_nodes("\n\n".join(parts))


def _body(metric: Metric) -> str:
    label = metric.label.replace("{}", "<name>")
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"**{inline(label, lambda _: None)}**{inline(unit, lambda _: None)}: {_text(metric)}"


def _text(metric: Metric) -> str:
    text = inline(metric.meaning, lambda _: None)
    if metric.good:
        text += f" **Should look like:** {inline(metric.good, lambda _: None)}"
    if metric.checks:
        text += " **If it does not:** see " + ", ".join(f"{{check}}`{name}`" for name in metric.checks) + "."
    return text
