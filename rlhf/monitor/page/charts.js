"use strict";
// The charts of one stage: a card for each, all with the same steps, zoomed and read together.

class Charts {
  #root; #curves; #app;
  #cards = [];
  #built = "";
  #smoothing = 0;
  #zoom = null;
  #zoomTimer = 0;

  constructor(root, curves, app) {
    this.#root = root;
    this.#curves = curves;
    this.#app = app;
    this.resetButton = el("button", { type: "button", id: "whole", hidden: true, onclick: () => this.zoomTo(null) }, "Show all steps");
    this.stages = el("div", { class: "segments", role: "group", "aria-label": "Stage" });
    this.body = el("div", {});
    const slider = el("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, id: "smoothing" });
    const shown = el("output", { for: "smoothing" }, "off");
    slider.addEventListener("input", () => {
      this.#smoothing = Number(slider.value);
      shown.textContent = this.#smoothing ? this.#smoothing.toFixed(2) : "off";
      this.draw();
    });
    const tools = el("div", { class: "tools" }, this.stages,
      el("label", { for: "smoothing" }, "Smoothing ", slider, shown), this.resetButton,
      el("p", { class: "hint" }, "Drag to zoom; double-click shows all. With the keyboard: arrows read, + and − zoom, Escape shows all."));
    root.append(tools, this.body);
  }

  /** Builds the cards anew when stage, runs, metrics or theme have changed; otherwise draws what is new. */
  show() {
    const { stage, runs } = this.#app.view();
    if (!stage) {
      this.#forget();
      this.body.replaceChildren(el("p", { class: "empty" }, this.#app.emptyText()));
      this.stages.replaceChildren();
      return;
    }
    const names = [...new Set(runs.flatMap((run) => run.stages.find((one) => one.name === stage)?.metrics ?? []))];
    const key = JSON.stringify([stage, runs.map((run) => run.number), names, css("--ink")]);
    refresh(this.stages, [this.#app.stageNames(), stage], () => this.#app.stageNames().map((name) =>
      el("button", { type: "button", "aria-pressed": String(name === stage), onclick: () => this.#app.setStage(name) }, name)));
    if (key === this.#built) return this.draw();
    this.#forget();
    this.#built = key;
    this.body.replaceChildren(...questionsFor(names).map(([question, charts]) => this.#group(question, charts)));
    this.draw();
  }

  draw() {
    if (this.#root.hidden) return;
    const { stage, runs } = this.#app.view();
    for (const card of this.#cards) card.draw(stage, runs, this.#curves, this.#smoothing);
  }

  /** Shows steps [first, last] in every chart; null shows all. */
  zoomTo(range) {
    this.#zoom = range;
    this.resetButton.hidden = !range;
    this.draw();
    clearTimeout(this.#zoomTimer);
    this.#zoomTimer = setTimeout(async () => {
      const { stage, runs } = this.#app.view();
      await this.#curves.zoom(runs.map((run) => run.number), stage, range).catch(() => {});
      this.draw();
    }, 150);
  }

  get range() {
    return this.#zoom;
  }

  get unit() {
    const { stage, runs } = this.#app.view();
    return runs.flatMap((run) => run.stages).find((one) => one.name === stage)?.unit ?? "step";
  }

  #group(question, charts) {
    const cards = charts.map((chart) => (chart.scatter ? new TradeCard(this, chart) : new CurveCard(this, chart)));
    this.#cards.push(...cards);
    return el("section", { class: "question" }, el("h2", {}, question), el("div", { class: "grid" }, cards.map((card) => card.root)));
  }

  #forget() {
    for (const card of this.#cards) card.destroy();
    this.#cards = [];
    this.#built = "";
  }
}
