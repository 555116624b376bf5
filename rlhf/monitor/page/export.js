"use strict";
// Charts as files: PNG as drawn, SVG of the same lines, CSV of the numbers.

function save(name, type, content) {
  const link = el("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const fileName = (title, ending) => `${title.toLowerCase().replace(/[^a-z0-9]+/g, "_").replace(/^_|_$/g, "") || "chart"}.${ending}`;

function exportButtons(card) {
  return el("span", { class: "exports" }, ["PNG", "SVG", "CSV"].map((kind) =>
    el("button", { type: "button", class: "quiet small", "aria-label": `Save as ${kind}`, onclick: () => EXPORTS[kind](card) }, kind)));
}

const EXPORTS = {
  PNG(card) {
    const drawn = card.plot?.ctx.canvas;
    if (!drawn) return;
    const canvas = el("canvas", { width: drawn.width, height: drawn.height });
    const context = canvas.getContext("2d");
    context.fillStyle = css("--paper");
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(drawn, 0, 0);
    canvas.toBlob((blob) => save(fileName(card.heading, "png"), "image/png", blob));
  },
  SVG(card) {
    if (card.plot) save(fileName(card.heading, "svg"), "image/svg+xml", toSVG(card.plot, card.heading));
  },
  CSV(card) {
    if (card.plot) save(fileName(card.heading, "csv"), "text/csv", toCSV(card.columns()));
  },
};

/** Rows of [heading, values] columns; what is missing is empty. */
function toCSV(columns) {
  const quoted = (text) => (/[",\n\r]/.test(text) ? `"${String(text).replaceAll('"', '""')}"` : String(text));
  const rows = columns[0][1].map((_, row) => columns.map(([, values]) => values[row] ?? "").join(","));
  return `${[columns.map(([heading]) => quoted(heading)).join(","), ...rows].join("\n")}\n`;
}

/** The plot's visible lines with the axes' ends, as a picture that any program for drawings opens. */
function toSVG(plot, title) {
  const escaped = (text) => String(text).replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const [width, height] = [plot.width, plot.height];
  const [left, top] = [plot.over.offsetLeft, plot.over.offsetTop];
  const [right, bottom] = [left + plot.over.clientWidth, top + plot.over.clientHeight];
  const lines = plot.series.slice(1).flatMap((series, place) => {
    const stroke = typeof series.stroke === "function" ? series.stroke(plot, place + 1) : series.stroke;
    if (!series.width || stroke === "transparent") return [];
    const points = plot.data[place + 1].flatMap((value, row) => (value == null ? [] : [`${(left + plot.valToPos(plot.data[0][row], "x")).toFixed(2)},${(top + plot.valToPos(value, "y")).toFixed(2)}`]));
    return [`<polyline fill="none" stroke="${escaped(stroke)}" stroke-width="${series.width}" points="${points.join(" ")}"/>`];
  });
  const { x, y } = plot.scales;
  const texts = [[left, bottom + 16, number(x.min)], [right, bottom + 16, number(x.max)], [left - 6, bottom, number(y.min)], [left - 6, top + 8, number(y.max)]];
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -20 ${width} ${height + 30}" font-family="sans-serif" font-size="11">
<title>${escaped(title)}</title><text x="${left}" y="-6" font-size="13">${escaped(title)}</text>
<path d="M${left},${top}V${bottom}H${right}" fill="none" stroke="#555555"/>
${texts.map(([at, line, text], place) => `<text x="${at}" y="${line}" text-anchor="${place === 0 ? "start" : "end"}">${escaped(text)}</text>`).join("\n")}
${lines.join("\n")}
</svg>
`;
}
