"use strict";
// Metrics over steps.

const RUN_DASHES = [[], [7, 4], [2, 3]];

/** Lines to draw: one for each group of runs with equal settings where there are several of them, else one for each run. */
function groupsOf(runs) {
  const groups = TABLE.comparison.groups
    .map(({ name, runs: numbers }) => ({ name, members: runs.filter((run) => numbers.includes(run.number)) }))
    .filter(({ members }) => members.length);
  if (groups.length < 2 || groups.every(({ members }) => members.length === 1)) return runs.map((run) => ({ run, members: [run], name: run.name }));
  return groups.map(({ name, members }) => ({ run: members[0], members, name: members.length > 1 ? `${name} (mean of ${members.length}, 95% interval)` : name }));
}

/** The mean of several curves of a metric at the steps that all have, with the 95% interval of the mean (Student's t), within its bounds, as its band. */
function meanCurve(curves, metric) {
  const tables = curves.map(({ x, mean }) => new Map(x.map((step, place) => [step, mean[place]])));
  const x = curves[0].x.filter((step) => tables.every((table) => table.get(step) != null));
  const rows = x.map((step) => tables.map((table) => table.get(step)));
  const means = rows.map((values) => values.reduce((sum, value) => sum + value, 0) / values.length);
  const quantile = TABLE.comparison.quantiles[curves.length - 2] ?? 1.96;
  const halves = rows.map((values, row) =>
    quantile * Math.sqrt(values.reduce((sum, value) => sum + (value - means[row]) ** 2, 0) / (values.length - 1) / values.length));
  const [least, most] = [metric.low ?? -Infinity, metric.high ?? Infinity];
  const low = means.map((mean, row) => (mean >= least ? Math.max(mean - halves[row], least) : mean - halves[row]));
  const high = means.map((mean, row) => (mean <= most ? Math.min(mean + halves[row], most) : mean + halves[row]));
  return { x, mean: means, low, high, weight: x.map(() => 1) };
}

/** Metrics over steps: a line per run and metric; thinned ones with the band from lowest to highest. */
class CurveCard extends Card {
  zoomable = true;

  constructor(owner, { title, metrics }) {
    const known = metrics.map(describe);
    const explanation = metrics.flatMap((name, place) => [
      el("p", {}, el("b", {}, known[place].label), " ", el("code", {}, name), ". ", known[place].meaning),
      known[place].good ? el("p", { class: "good" }, el("b", {}, "Good: "), known[place].good) : null,
    ]);
    const heading = metrics.length > 1 ? title : known[0].label;
    super(owner, heading, metrics.join("  "), explanation);
    this.title = heading;
    this.metrics = metrics;
    this.known = known;
  }

  draw(stage, runs, curves, smoothing) {
    const lines = [];
    const several = groupsOf(runs);
    for (const { run, members, name: group } of several) {
      this.metrics.forEach((name, place) => {
        const found = members.map((member) => curves.get(member.number, stage, name)).filter((curve) => curve?.x.length);
        const curve = found.length > 1 ? meanCurve(found, this.known[place]) : found[0];
        if (curve?.x.length) lines.push({ run, place, curve, label: this.#label(several, group, place) });
      });
    }
    if (!lines.length) return;
    this.#colour(lines, runs);
    const tables = lines.map(({ curve }) => [curve.x, ...this.#columns(curve, smoothing)]);
    const shape = JSON.stringify(lines.map(({ run, place, curve }) => [run.number, place, curve.low.length > 0, curve.x.length <= 25, smoothing > 0]));
    this.lines = lines;
    this.put(shape, this.#options(lines, smoothing), uPlot.join(tables));
    this.#legend(lines);
    this.read(this.plot?.cursor.idx);
  }

  #label(several, group, place) {
    const metric = this.known[place].label;
    if (several.length === 1) return metric;
    return this.metrics.length === 1 ? group : `${group}: ${metric}`;
  }

  /** [heading, values] of the steps and of every line, for a file. */
  columns() {
    return [[this.owner.unit, this.plot.data[0]], ...this.lines.map(({ column, label }) => [label, this.plot.data[column]])];
  }

  #colour(lines, runs) {
    for (const line of lines) {
      line.stroke = colour(runs.length > 1 ? line.run.number : line.place);
      line.dash = runs.length > 1 ? RUN_DASHES[(line.place + Math.floor(line.run.number / 7)) % 3] : [];
    }
  }

  #columns(curve, smoothing) {
    const band = curve.low.length ? [curve.low, curve.high] : [];
    return smoothing ? [...band, curve.mean, smoothed(curve, smoothing)] : [...band, curve.mean];
  }

  #options(lines, smoothing) {
    const series = [{}];
    const bands = [];
    for (const line of lines) {
      const { stroke, dash, curve } = line;
      if (curve.low.length) {
        bands.push({ series: [series.length + 1, series.length], fill: faded(stroke, 0.18) });
        series.push({ stroke: "transparent", width: 0, points: { show: false } }, { stroke: "transparent", width: 0, points: { show: false } });
      }
      const points = { show: curve.x.length <= 25, size: 5, stroke, fill: stroke };
      if (smoothing) series.push({ stroke: faded(stroke, curve.x.length > 300 ? 0.22 : 0.4), width: 1, points: { show: false } });
      line.column = series.length;
      series.push({ stroke, width: 1.75, dash, points: smoothing ? { show: false } : points });
    }
    const lowest = Math.min(...this.known.map(({ low }) => low ?? NaN).map((low) => (Number.isNaN(low) ? Infinity : low)));
    const highest = Math.max(...this.known.map(({ high }) => high ?? -Infinity));
    return {
      series, bands,
      axes: this.axes(this.owner.unit, this.known[0].unit),
      scales: {
        x: { time: false, range: (_, min, max) => this.owner.range ?? (min === max ? [min - 1, max + 1] : [min, max]) },
        y: { range: {
          min: { pad: 0.08, soft: Number.isFinite(lowest) ? lowest : null, mode: Number.isFinite(lowest) ? 1 : 0 },
          max: { pad: 0.08, soft: Number.isFinite(highest) ? highest : null, mode: Number.isFinite(highest) ? 1 : 0 },
        } },
      },
      cursor: {
        y: false,
        drag: { x: true, y: false, setScale: false },
        bind: { dblclick: () => () => this.owner.zoomTo(null) },
        sync: { key: "steps", scales: ["x", null], filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
        points: { size: 7 },
      },
      hooks: {
        setCursor: [(plot) => this.read(plot.cursor.idx)],
        setSelect: [(plot) => {
          const { left, width } = plot.select;
          if (width < 5) return;
          plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          this.owner.zoomTo([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
        }],
      },
    };
  }

  #legend(lines) {
    this.frame.setAttribute("aria-label", `${this.title}: ${lines.map((line) => `${line.label}, latest ${inUnit(lastOf(line.curve.mean), this.known[line.place].unit)}`).join("; ")}`);
    refresh(this.legend, lines.map(({ label, stroke }) => [label, stroke]), () => lines.length < 2 ? [] : lines.map(({ label, stroke, dash }) =>
      el("li", {}, el("span", { class: dash.length ? "line dashed" : "line", style: { "border-color": stroke } }), label)));
  }

  /** Writes the values at one place under the chart; without a place, those at its right edge. */
  read(place) {
    const plot = this.plot;
    if (!plot || !this.lines) return;
    const range = this.owner.range;
    const at = place ?? (range ? plot.data[0].findLastIndex((x) => x <= range[1]) : plot.data[0].length - 1);
    if (at < 0) return;
    const values = this.lines.map(({ column, label, place: metric }) => {
      let back = at;
      while (back > 0 && plot.data[column][back] == null) back -= 1;
      return el("span", {}, this.lines.length > 1 ? `${label} ` : "", el("b", {}, inUnit(plot.data[column][back], this.known[metric].unit)));
    });
    const step = number(Math.round(plot.data[0][at]));
    this.readout.replaceChildren(el("span", {}, place == null && !range ? "latest" : `${this.owner.unit} ${step}`), ...values);
  }
}
