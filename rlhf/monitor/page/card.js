"use strict";
// What every chart has: a frame with heading, explanation, legend, axes and keys.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (place) => css(`--series-${place % 7}`);

const lastOf = (values) => values.findLast((value) => value != null);

/** Ticks with as many decimals as their distance needs, all alike. */
function tickTexts(ticks) {
  const largest = Math.max(...ticks.map(Math.abs));
  if (largest < 1e-3 || largest >= 1e6) return ticks.map((tick) => number(Number(tick.toPrecision(12))));
  const step = ticks.length > 1 ? ticks[1] - ticks[0] : ticks[0];
  let digits = 0;
  while (digits < 9 && Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) > 1e-6) digits += 1;
  const form = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return ticks.map((tick) => (tick + 0).toLocaleString("en", form).replace("-", "−"));
}

/** A CSS colour #rrggbb with an opacity. */
function faded(hex, opacity) {
  const [red, green, blue] = [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
  return `rgb(${red} ${green} ${blue} / ${opacity})`;
}

/** A framed chart with heading, explanation, legend and readout. */
class Card {
  height = 225;

  constructor(owner, title, names, explanation) {
    this.owner = owner;
    this.plot = null;
    this.shape = "";
    const more = el("div", { class: "more", hidden: true }, explanation);
    const button = el("button", {
      type: "button", class: "quiet round", "aria-expanded": "false", "aria-label": `What is ${title}?`,
      onclick: () => {
        more.hidden = !more.hidden;
        button.setAttribute("aria-expanded", String(!more.hidden));
      },
    }, "?");
    this.heading = title;
    this.frame = el("div", { class: "frame", tabindex: 0, role: "img", onkeydown: (event) => this.key(event) });
    this.readout = el("p", { class: "readout" });
    this.legend = el("ul", { class: "legend" });
    this.root = el("article", { class: "card" },
      el("header", {}, el("div", {}, el("h3", {}, title), el("p", { class: "names" }, names)), exportButtons(this), button),
      more, this.legend, this.frame, this.readout);
    this.watcher = new ResizeObserver(() => this.resize());
    this.watcher.observe(this.frame);
  }

  size() {
    return { width: Math.max(160, Math.floor(this.frame.clientWidth)), height: this.height };
  }

  resize() {
    if (this.plot && this.frame.clientWidth) this.plot.setSize(this.size());
  }

  /** Makes or updates the plot; a new one only when its series have changed. */
  put(shape, options, data) {
    if (!this.frame.clientWidth) return;
    if (this.plot && shape === this.shape) {
      this.plot.setData(data);
      return;
    }
    this.plot?.destroy();
    this.shape = shape;
    this.plot = new uPlot({ ...this.size(), legend: { show: false }, padding: [10, 12, 0, 0], ...options }, data, this.frame);
  }

  axes(xLabel, yLabel) {
    const common = {
      stroke: css("--dim"), font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", labelGap: 2,
      grid: { stroke: css("--grid"), width: 1 }, ticks: { stroke: css("--grid"), width: 1, size: 4 },
    };
    const share = yLabel.startsWith("share");
    const written = (scale) => (_, ticks) => tickTexts(ticks.map((tick) => scale * tick));
    return [
      { ...common, values: written(1), label: xLabel, labelSize: 18, size: 30, space: 60 },
      { ...common, values: written(share ? 100 : 1), label: (share ? `% ${unitName(yLabel)}` : yLabel) || " ", labelSize: 18, size: 52, space: 32 },
    ];
  }

  key(event) {
    const plot = this.plot;
    if (!plot) return;
    const { min, max } = plot.scales.x;
    const zoom = { "+": 0.5, "=": 0.5, "-": 2, "−": 2 }[event.key];
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const x = plot.data[0];
      const here = plot.cursor.idx ?? (event.key === "ArrowLeft" ? x.length : -1);
      const next = Math.min(x.length - 1, Math.max(0, here + (event.key === "ArrowLeft" ? -1 : 1)));
      plot.setCursor({ left: plot.valToPos(x[next], "x"), top: 1 });
    } else if (zoom && this.zoomable) {
      const middle = plot.cursor.idx == null ? (min + max) / 2 : plot.data[0][plot.cursor.idx];
      const half = Math.max(1, ((max - min) * zoom) / 2);
      const all = [plot.data[0][0], plot.data[0].at(-1)];
      const range = [Math.max(all[0], middle - half), Math.min(all[1], middle + half)];
      this.owner.zoomTo(range[0] <= all[0] && range[1] >= all[1] ? null : range);
    } else if (event.key === "Escape") {
      this.owner.zoomTo(null);
    } else return;
    event.preventDefault();
  }

  /** [heading, values] of the x axis and of every line, for a file. */
  columns() {
    return [["x", this.plot.data[0]], ...this.plot.data.slice(1).map((values, place) => [this.plot.series[place + 1].label || `line ${place + 1}`, values])];
  }

  destroy() {
    this.watcher.disconnect();
    this.plot?.destroy();
  }
}
