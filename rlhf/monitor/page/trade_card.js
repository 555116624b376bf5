"use strict";
// Score against KL: is the policy over-optimised?

/** Shades of a run's time. */
const PARTS = 6;

/** Score against the square root of the KL: what each bit of distance from the reference buys. */
class TradeCard extends Card {
  zoomable = false;
  height = 300;

  constructor(owner, { title }) {
    super(owner, title, "objective/scores over √objective/kl", [
      el("p", {}, "Each point is a step; its shade tells when it was. Gao et al. 2022 (“Scaling laws for reward model over-optimization”) found that the true quality of a policy first rises and then falls with √KL, while the reward it is trained on goes on rising."),
      el("p", { class: "good" }, el("b", {}, "Good: "), "strong points lie higher than pale ones, and so do those of a gold score, where there is one. Where they move to the right alone, more KL buys nothing."),
    ]);
    this.root.classList.add("wide");
  }

  draw(stage, runs, curves) {
    const sets = [];
    for (const run of runs) {
      const kl = curves.get(run.number, stage, "objective/kl");
      const metrics = run.stages.find((one) => one.name === stage)?.metrics ?? [];
      for (const name of ["objective/scores", ...metrics.filter((one) => one.startsWith("gold/"))]) {
        const score = curves.get(run.number, stage, name);
        const points = kl && score ? pair(kl, score) : [];
        const what = name === "objective/scores" ? "score" : `gold: ${name.slice(5)}`;
        if (points.length) sets.push({ points, label: runs.length > 1 ? `${run.name}: ${what}` : what, gold: name !== "objective/scores", run });
      }
    }
    if (!sets.length) return;
    sets.forEach((set, place) => {
      set.stroke = colour(runs.length > 1 ? set.run.number : place);
    });
    const tables = sets.flatMap(({ points }) => parts(points).map(columns));
    this.sets = sets;
    this.put(JSON.stringify(sets.map(({ label }) => label)), this.#options(sets), uPlot.join(tables));
    this.frame.setAttribute("aria-label", `Score against the square root of the KL, ${plural(sets[0].points.length, "step")}`);
    refresh(this.legend, sets.map(({ label, stroke }) => [label, stroke]), () => sets.map(({ label, stroke, gold }) =>
      el("li", {}, el("span", { class: "point", style: { "border-color": stroke, background: gold ? "none" : stroke } }), label)));
    this.readout.textContent = "points are steps: the paler, the earlier";
  }

  #options(sets) {
    const series = [{}];
    for (const { stroke, gold } of sets) {
      for (let part = 1; part <= PARTS; part += 1) {
        const ink = faded(stroke, 0.2 + (0.8 * part) / PARTS);
        series.push({ stroke: ink, paths: () => null, points: { show: true, size: 6, width: 1.5, stroke: gold ? ink : "transparent", fill: gold ? "transparent" : ink } });
      }
    }
    return {
      series,
      axes: this.axes("√KL to the reference (√nats per completion)", "score, in its own units"),
      scales: { x: { time: false, range: (_, min, max) => [Math.min(0, min), max > 0 ? max * 1.03 : 1] } },
      cursor: { drag: { x: false, y: false } },
      hooks: { setCursor: [(plot) => {
        const { left, top } = plot.cursor;
        if (left == null || left < 0) return;
        this.readout.textContent = `√KL ${number(plot.posToVal(left, "x"))}   score ${number(plot.posToVal(top, "y"))}`;
      }] },
    };
  }
}

/** [√kl, score] of the steps that have both, in their order. An estimate of the KL below 0 counts as 0. */
function pair(kl, score) {
  const at = new Map(score.x.map((step, place) => [step, score.mean[place]]));
  return kl.x
    .map((step, place) => [kl.mean[place], at.get(step)])
    .filter(([x, y]) => x != null && y != null)
    .map(([x, y]) => [Math.sqrt(Math.max(0, x)), y]);
}

/** The points in equal parts of the run's time, each by rising √kl. */
function parts(points) {
  const cut = (part) => Math.floor((part * points.length) / PARTS);
  return Array.from({ length: PARTS }, (_, part) => points.slice(cut(part), cut(part + 1)).sort(([one], [other]) => one - other));
}

/** Columns x and y of points; x without repetitions, as joining needs it: a repeated one is moved by less than can be seen. */
function columns(points) {
  const moved = [];
  for (const [value] of points) moved.push(moved.length && value <= moved.at(-1) ? moved.at(-1) + 1e-9 * Math.max(1, moved.at(-1)) : value);
  return [moved, points.map(([, y]) => y)];
}
