"use strict";
// Where the runs stand, what the checks say, and what the model says now.

const LEVELS = [
  ["problem", "✕", "Problem"],
  ["warning", "!", "Warning"],
  ["unknown", "?", "Cannot be told"],
  ["ok", "✓", "Passed"],
];

/** [word, kind] for a stage: kind is good, busy, warn or bad. */
function stageStatus(stage, now) {
  if (stage.state === "ended") return ["done", "good"];
  if (stage.state === "interrupted") return ["stopped, continue with --resume", "warn"];
  if (stage.state === "failed") return ["stopped by an error, or by a number that was not finite: see the log", "bad"];
  const silent = now - stage.time;
  if (stage.time != null && silent > Math.max(120, 20 * (stage.pace ?? 0))) return [`silent for ${duration(silent)}: killed?`, "warn"];
  return ["running", "busy"];
}

function runStatus(run, now) {
  if (!run.stages.length) return ["nothing written yet", "warn"];
  const states = run.stages.map((stage) => stageStatus(stage, now));
  const last = states.at(-1);
  return last[1] === "good" ? ["finished", "good"] : [`${run.stages.at(-1).name} ${last[0]}`, last[1]];
}

class Overview {
  #root; #curves; #app;
  #parts = new Map();

  constructor(root, curves, app) {
    this.#root = root;
    this.#curves = curves;
    this.#app = app;
  }

  draw(now) {
    const runs = this.#app.visibleRuns();
    refresh(this.#root, [runs.map((run) => run.number), this.#app.emptyText()], () => {
      this.#parts = new Map(runs.map((run) => [run.number, this.#frame(run, this.#app.runs.length > 1)]));
      this.table = el("div", {});
      return runs.length ? [this.table, ...[...this.#parts.values()].map((parts) => parts.root)] : [el("p", { class: "empty" }, this.#app.emptyText())];
    });
    if (runs.length > 1) {
      refresh(this.table, [runs.map((run) => run.name), TABLE.comparison], () => [el("h2", {}, "Comparison"), comparisonTable(runs, TABLE.comparison)]);
    }
    for (const run of runs) this.#fill(this.#parts.get(run.number), run, now);
  }

  #frame(run, several) {
    const parts = { verdicts: el("div", {}), progress: el("div", { class: "progress" }), figures: el("dl", { class: "figures" }), health: el("div", { class: "health" }), says: el("div", {}), problems: el("div", {}) };
    parts.root = el("section", { class: "run" },
      several ? el("h2", { class: "run-name" }, swatch(run.number), run.name) : null,
      parts.problems,
      el("div", { class: "columns" },
        el("div", {}, el("h2", {}, "Progress"), parts.progress, parts.verdicts, parts.figures, parts.says),
        el("div", {}, el("h2", {}, "Health"), parts.health)));
    return parts;
  }

  #fill(parts, run, now) {
    refresh(parts.problems, run.problems, () => run.problems.map((problem) => el("p", { class: "notice" }, problem)));
    const rows = run.stages.map((stage) => [stage, stageStatus(stage, now)]);
    refresh(parts.progress, rows.map(([stage, status]) => [stage.name, stage.step, stage.total, status]), () =>
      rows.length ? rows.map(([stage, status]) => progressRow(stage, status)) : [el("p", { class: "empty" }, "This run has not written anything yet. It appears here as soon as it does.")]);
    refresh(parts.verdicts, run.verdicts ?? {}, () => Object.entries(run.verdicts ?? {}).map(([stage, { text, sound }]) =>
      el("p", { class: sound ? "verdict" : "verdict notice" }, el("b", {}, `${stage}: `), flagged(text))));
    this.#figures(parts.figures, run);
    refresh(parts.health, run.findings, () => healthList(run.findings, this.#app));
    if (run.samples) this.#says(parts, run);
  }

  #figures(node, run) {
    const stage = run.stages.at(-1);
    const shown = headlines(stage?.metrics ?? []).flatMap((name) => {
      const curve = this.#curves.get(run.number, stage.name, name, true);
      const last = curve && lastOf(curve.mean);
      return last == null ? [] : [[name, last, curve.mean.find((value) => value != null), curve]];
    });
    refresh(node, shown.map(([name, last]) => [name, last]), () => shown.map(([name, last, first, curve]) => {
      const { label, unit, meaning } = describe(name);
      return el("div", { class: "figure", title: `${name}. ${meaning}` },
        el("dt", {}, label), el("dd", {}, el("b", {}, inUnit(last, unit)), el("span", { class: "unit" }, unitName(unit)),
          el("span", { class: "from" }, curve.mean.length > 1 ? `${inUnit(Math.abs(first) < 1e-4 ? 0 : first, unit)} at first` : "")), sparkline(curve, run.number));
    }));
  }

  async #says(parts, run) {
    if (parts.asked === run.samples) return;
    parts.asked = run.samples;
    const answer = await this.#app.source
      .samples({ run: run.number, text: "", sort: "newest", ended: "", pairs: "yes", offset: 0, limit: 1 })
      .catch(() => null);
    if (!answer?.rows.length) return;
    refresh(parts.says, answer.rows[0], () => [
      el("h2", {}, "Then and now"), pairCard(answer.rows[0], "none"),
      el("p", {}, el("button", { type: "button", onclick: () => this.#app.setTab("samples") }, "All samples"))]);
  }
}

const swatch = (place) => el("span", { class: "swatch", style: { background: `var(--series-${place % 7})` } });

function progressRow(stage, [word, kind]) {
  const share = stage.total ? Math.min(1, stage.step / stage.total) : 0;
  const left = kind === "busy" && stage.pace && stage.total ? `, about ${duration(stage.pace * (stage.total - stage.step))} left` : "";
  return el("div", { class: "stage" },
    el("div", { class: "stage-head" }, el("b", {}, stage.name), el("span", {}, `${stage.unit} ${stage.step.toLocaleString("en")}${stage.total ? ` of ${stage.total.toLocaleString("en")}` : ""}${left}`), el("span", { class: `status ${kind}` }, word)),
    el("progress", { max: 1, value: share, "aria-label": `${stage.name}: ${percent(share)}` }));
}

function sparkline(curve, place) {
  const known = curve.mean.map((value, place) => [curve.x[place], value]).filter(([, value]) => value != null);
  const size = Math.max(1, Math.ceil(known.length / 120));
  const points = known.filter((_, place) => place % size === 0 || place === known.length - 1);
  if (points.length < 2) return null;
  const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
  const [left, low] = [Math.min(...xs), Math.min(...ys)];
  const [width, height] = [Math.max(...xs) - left || 1, Math.max(...ys) - low || 1];
  const path = points.map(([x, y]) => `${((100 * (x - left)) / width).toFixed(1)},${(24 - (22 * (y - low)) / height).toFixed(1)}`).join(" ");
  const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  for (const [name, value] of [["viewBox", "0 0 100 26"], ["preserveAspectRatio", "none"], ["aria-hidden", "true"], ["class", "sparkline"]]) picture.setAttribute(name, value);
  line.setAttribute("points", path);
  line.style.setProperty("stroke", `var(--series-${place % 7})`);
  picture.append(line);
  return picture;
}

/** Problems and warnings open, the rest folded away unless there is room. */
function healthList(findings, app) {
  if (!findings.length) return [el("p", { class: "empty" }, "No check has anything to go by yet.")];
  return LEVELS.flatMap(([level, sign, word]) => {
    const some = findings.filter((finding) => finding.level === level);
    if (!some.length) return [];
    const list = el("ul", { class: "findings" }, some.map((finding) => findingRow(finding, sign, word, app)));
    if (level === "problem" || level === "warning") return [list];
    const calm = app.runs.length === 1 && !findings.some((finding) => finding.level === "problem" || finding.level === "warning");
    return [el("details", { open: calm && level === "ok" }, el("summary", {}, el("span", { class: `sign ${level}` }, sign), `${word}: ${plural(some.length, "check")}`), list)];
  });
}

function findingRow(finding, sign, word, app) {
  const grave = finding.level === "problem" || finding.level === "warning";
  const [first, last] = finding.steps ?? [];
  const where = first === last ? `step ${first}` : `steps ${first} to ${last}`;
  const steps = first == null ? "" : [" ", el("button", { type: "button", class: "link", onclick: () => app.showSteps(finding.stage, first, last) }, where)];
  return el("li", { class: finding.level },
    el("span", { class: `sign ${finding.level}`, title: word, "aria-label": word }, sign),
    el("div", {},
      el("p", {}, el("b", {}, visible(finding.summary)), " ", el("span", { class: "names" }, `${finding.stage} · ${finding.check}`)),
      finding.evidence ? el("p", { class: "evidence" }, visible(finding.evidence), steps) : null,
      grave && finding.cause ? el("p", {}, el("b", {}, "Usually: "), flagged(finding.cause)) : null,
      grave && finding.advice ? el("p", { class: "advice" }, el("b", {}, "Change: "), flagged(finding.advice)) : null));
}
