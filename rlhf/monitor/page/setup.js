"use strict";
// What a run was made with: settings, provenance and data; what its evaluation says; and how runs compare.

const PROMISE = "The same processor, torch and threads give the same bits.";

class Setup {
  #root; #app;

  constructor(root, app) {
    this.#root = root;
    this.#app = app;
  }

  show() {
    const runs = this.#app.visibleRuns();
    refresh(this.#root, runs.map((run) => [run.number, run.setup, run.evaluation]), () =>
      runs.length ? runs.map((run) => this.#run(run, this.#app.runs.length > 1)) : [el("p", { class: "empty" }, this.#app.emptyText())]);
  }

  #run(run, several) {
    const stages = Object.entries(run.setup ?? {}).filter(([, setup]) => Object.keys(setup.settings).length);
    return el("section", { class: "run" },
      several ? el("h2", { class: "run-name" }, swatch(run.number), run.name) : null,
      evaluationTables(run.evaluation),
      el("h2", {}, "Settings and provenance"),
      stages.length ? el("p", { class: "hint" }, PROMISE) : el("p", { class: "empty" }, "The log of this run does not say; it is of an older version."),
      stages.map(([stage, setup], place) => el("details", { open: place === stages.length - 1 },
        el("summary", {}, stage),
        el("div", { class: "columns" },
          factTable("Provenance", Object.entries(setup.provenance)),
          factTable("Settings", Object.entries(setup.settings))))));
  }
}

function factTable(caption, rows) {
  return el("table", { class: "facts" }, el("caption", {}, caption), el("tbody", {}, rows.map(([name, value]) =>
    el("tr", {}, el("th", { scope: "row" }, visible(name)), el("td", {}, visible(factText(value)))))));
}

const factText = (value) => (value == null ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));

/** The tables of rlhf-evaluate, each with its sentence. */
function evaluationTables(content) {
  if (!content?.evaluations?.length) return null;
  return [el("h2", {}, "Evaluation"), content.evaluations.map((evaluation) => {
    const columns = Object.entries(evaluation.figures ?? {}).filter(([name]) => name !== "wins");
    const names = Object.keys(columns[0]?.[1] ?? {});
    return el("table", { class: "facts" },
      el("caption", {}, visible(`${evaluation.eval_type}: ${evaluation.data}${evaluation.data_origin ? ` (${evaluation.data_origin})` : ""}`)),
      el("thead", {}, el("tr", {}, el("th", {}, "figure"), columns.map(([name]) => el("th", { scope: "col" }, visible(name))))),
      el("tbody", {}, names.map((name) => el("tr", {}, el("th", { scope: "row" }, visible(name)), columns.map(([, figures]) => el("td", {}, figureText(figures[name])))))),
      evaluation.verdict ? el("tfoot", {}, el("tr", {}, el("td", { colspan: columns.length + 1 }, visible(evaluation.verdict)))) : null);
  })];
}

const figureText = (figure) =>
  !figure ? "" : `${number(figure.value)}${figure.low == null ? "" : ` [${number(figure.low)}, ${number(figure.high)}]`}`;

/** Final figures of every run, with means and 95% intervals of groups with equal settings. */
function comparisonTable(runs, comparison) {
  const names = [...TABLE.metrics.keys()].filter((name) => comparison.runs.some((figures) => name in figures));
  const cells = (figures) => names.map((name) => {
    const [value, low, high] = figures[name] ?? [];
    const { unit } = describe(name);
    return el("td", {}, value == null ? "" : inUnit(value, unit), low == null ? null : el("small", {}, ` [${inUnit(low, unit)}, ${inUnit(high, unit)}]`));
  });
  const shown = new Set(runs.map((run) => run.number));
  const groups = comparison.groups.filter((group) => group.runs.some((run) => shown.has(run)));
  return el("div", { class: "scroll" }, el("table", { class: "facts comparison" },
    el("caption", {}, "Final figures: means of the newest tenth, at least five lines and at most 50; in brackets, 95% intervals over runs of equal settings"),
    el("thead", {}, el("tr", {}, el("th", {}, "run"), names.map((name) => el("th", { scope: "col" }, describe(name).label, el("small", {}, ` ${unitName(describe(name).unit)}`))))),
    groups.map((group) => el("tbody", {},
      group.name ? el("tr", {}, el("th", { class: "group", colspan: names.length + 1 }, visible(group.name))) : null,
      runs.filter((run) => group.runs.includes(run.number)).map((run) => el("tr", {}, el("th", { scope: "row" }, swatch(run.number), run.name), cells(comparison.runs[run.number]))),
      group.runs.length > 1 ? el("tr", { class: "mean" }, el("th", { scope: "row" }, `mean of ${group.runs.length} runs`), cells(group.figures)) : null))));
}
