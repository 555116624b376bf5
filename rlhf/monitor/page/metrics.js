"use strict";
// What is known of the metrics, as `rlhf.metrics` has it: the table comes with the runs.

/** Metrics by name in the table's order, and charts in theirs. */
const TABLE = { metrics: new Map(), charts: [], comparison: { runs: [], groups: [], quantiles: [] } };

function takeTable({ metrics, charts, comparison }) {
  TABLE.metrics = new Map(Object.entries(metrics));
  TABLE.charts = charts;
  TABLE.comparison = comparison;
}

const describe = (name) => TABLE.metrics.get(name) ?? { label: name, unit: "", meaning: "", good: "" };

/** [question, charts] for the metrics that are there. */
function questionsFor(names) {
  const there = new Set(names);
  const questions = new Map();
  for (const chart of TABLE.charts) {
    const metrics = chart.metrics.filter((name) => there.has(name));
    if (chart.scatter ? metrics.length < chart.metrics.length : !metrics.length) continue;
    if (!questions.has(chart.question)) questions.set(chart.question, []);
    questions.get(chart.question).push({ ...chart, metrics });
  }
  return [...questions];
}

/** The key figures among some metrics; the first ones where none is. */
function headlines(names) {
  const chosen = [...TABLE.metrics].filter(([name, { headline }]) => headline && names.includes(name)).map(([name]) => name);
  return chosen.length ? chosen : names.slice(0, 6);
}
