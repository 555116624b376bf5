"use strict";
// Score against KL: is the policy over-optimised?

/** Score against the square root of the KL: what each bit of distance from the reference buys. */
class TradeCard extends Card {
  zoomable = false;
  height = 300;

  constructor(owner) {
    super(owner, "Score against √KL", "objective/scores over √objective/kl", [
      el("p", {}, "Each point is a step. Gao et al. 2023 (“Scaling laws for reward model over-optimization”) found that the true quality of a policy first rises and then falls with √KL, while the reward it is trained on goes on rising."),
      el("p", { class: "good" }, el("b", {}, "Good: "), "the line rises steeply and a gold score, where there is one, rises with it. Where it turns flat, more KL buys nothing."),
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
    const tables = sets.flatMap(({ points }) => [
      [points.map(([x]) => x), points.map(([, y]) => y)],
      trend(points),
    ]).map(([x, y]) => unique(x, y));
    this.sets = sets;
    this.put(JSON.stringify(sets.map(({ label, points }) => [label, points.length < 3])), this.#options(sets), uPlot.join(tables));
    this.frame.setAttribute("aria-label", `Score against the square root of the KL, ${plural(sets[0].points.length, "step")}`);
    refresh(this.legend, sets.map(({ label, stroke }) => [label, stroke]), () => sets.map(({ label, stroke, gold }) =>
      el("li", {}, el("span", { class: gold ? "line dashed" : "line", style: { "border-color": stroke } }), label)));
    this.readout.textContent = "points are steps, the line is their mean along √KL";
  }

  #options(sets) {
    const series = [{}];
    for (const { stroke, gold } of sets) {
      series.push({ stroke, paths: () => null, points: { show: true, size: 6, stroke: "transparent", fill: faded(stroke, 0.45) } });
      series.push({ stroke, width: 2, dash: gold ? [7, 4] : [], spanGaps: true, points: { show: false } });
    }
    return {
      series,
      axes: this.axes("√KL to the reference (√nats per completion)", "reward units"),
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

/** [√kl, score] of the steps that have both, by rising √kl. An estimate of the KL below 0 counts as 0. */
function pair(kl, score) {
  const at = new Map(score.x.map((step, place) => [step, score.mean[place]]));
  return kl.x
    .map((step, place) => [kl.mean[place], at.get(step)])
    .filter(([x, y]) => x != null && y != null)
    .map(([x, y]) => [Math.sqrt(Math.max(0, x)), y])
    .sort(([one], [other]) => one - other);
}

/** Means of the points in up to 16 parts of equal count. */
function trend(points) {
  const parts = Math.min(16, Math.max(1, Math.floor(points.length / 3)));
  const xs = [];
  const ys = [];
  for (let part = 0; part < parts; part += 1) {
    const some = points.slice(Math.floor((part * points.length) / parts), Math.floor(((part + 1) * points.length) / parts));
    if (!some.length) continue;
    xs.push(some.reduce((sum, [x]) => sum + x, 0) / some.length);
    ys.push(some.reduce((sum, [, y]) => sum + y, 0) / some.length);
  }
  return [xs, ys];
}

/** x without repetitions, as joining needs it: a repeated one is moved by less than can be seen. */
function unique(x, y) {
  const moved = [];
  for (const value of x) moved.push(moved.length && value <= moved.at(-1) ? moved.at(-1) + 1e-9 * Math.max(1, moved.at(-1)) : value);
  return [moved, y];
}
