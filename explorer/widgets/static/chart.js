// Small charts in SVG: axes with units, lines, bands and marks. Put behind dom.js in front of the modules that draw.

const PAD = { left: 46, right: 14, top: 24, bottom: 38 };

/**
 * Draw a chart and return its SVG element, with `place(x, y)` giving pixels.
 *
 * spec.width, spec.height   pixels
 * spec.x, spec.y            { domain: [a, b], ticks: [[value, text]], label, map: value => number }; the y label stands above its axis
 * spec.bands                [{ from, to, label, shade }] stretches of the x axis
 * spec.rules                [{ y, label, dash, colour }] horizontal lines
 * spec.lines                [{ points: [[x, y]], colour, width, dash, opacity, dots, name }]
 * spec.areas                [{ points: [[x, low, high]], colour }] filled between two lines
 * spec.marks                [{ x, y, colour, r, label, left, diamond, title }]; `left` where the label is to stand left of the mark
 * spec.name                 what a screen reader says
 */
function chart(spec) {
  const { width, height } = spec;
  const pad = { ...PAD, ...spec.pad };
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spec.name });
  const scale = (axis, low, high) => {
    const map = axis.map ?? ((value) => value);
    const [a, b] = axis.domain.map(map);
    return (value) => low + ((map(value) - a) / (b - a || 1)) * (high - low);
  };
  const x = scale(spec.x, pad.left, width - pad.right);
  const y = scale(spec.y, height - pad.bottom, pad.top);
  const clampY = (value) => Math.min(height - pad.bottom, Math.max(pad.top, y(value)));
  const place = (px, py) => [x(px), clampY(py)];

  for (const band of spec.bands ?? []) {
    const [from, to] = [x(band.from), x(band.to)];
    if (band.shade)
      svg.append(draw("rect", { x: from, y: pad.top, width: Math.max(0, to - from), height: height - pad.top - pad.bottom, class: "se-band" }));
    if (band.label && to - from > band.label.length * 6)
      svg.append(draw("text", { x: (from + to) / 2, y: pad.top - 8, "text-anchor": "middle", class: "se-band-label" }, band.label));
  }
  for (const [value, text] of spec.y.ticks) {
    svg.append(draw("line", { x1: pad.left, x2: width - pad.right, y1: y(value), y2: y(value), class: "se-axis" }));
    svg.append(draw("text", { x: pad.left - 8, y: y(value) + 4, "text-anchor": "end" }, text));
  }
  // Where there is no room for every number some are left out.
  let free = -Infinity;
  for (const [value, text] of spec.x.ticks) {
    const half = text.length * 3.3;
    if (x(value) - half < free) continue;
    free = x(value) + half + 5;
    svg.append(draw("text", { x: x(value), y: height - pad.bottom + 16, "text-anchor": "middle" }, text));
  }
  if (spec.y.label) svg.append(draw("text", { x: pad.left, y: pad.top - 10 }, spec.y.label));
  if (spec.x.label)
    svg.append(draw("text", { x: (pad.left + width - pad.right) / 2, y: height - 4, "text-anchor": "middle" }, spec.x.label));

  for (const rule of spec.rules ?? []) {
    const at = clampY(rule.y);
    svg.append(draw("line", { x1: pad.left, x2: width - pad.right, y1: at, y2: at, "stroke-width": 1.5, "stroke-dasharray": rule.dash, style: `stroke:${rule.colour}` }));
    const above = at - pad.top > 16;
    if (rule.label)
      svg.append(draw("text", { x: rule.left ? pad.left + 4 : width - pad.right - 2, y: above ? at - 5 : at + 14, "text-anchor": rule.left ? "start" : "end", style: `fill:${rule.colour}`, class: "se-halo" }, rule.label));
  }
  for (const area of spec.areas ?? []) {
    if (area.points.length < 2) continue;
    const edge = (points) => points.map(([px, py]) => place(px, py).map((v) => v.toFixed(1)).join(" ")).join("L");
    const outline = `M${edge(area.points.map(([px, low]) => [px, low]))}L${edge(area.points.map(([px, , high]) => [px, high]).reverse())}Z`;
    svg.append(draw("path", { d: outline, "fill-opacity": 0.16, stroke: "none", style: `fill:${area.colour}`, class: "se-uncertain" }));
  }
  for (const line of spec.lines ?? []) {
    if (!line.points.length) continue;
    const path = line.points.map(([px, py], i) => `${i ? "L" : "M"}${place(px, py).map((v) => v.toFixed(1)).join(" ")}`).join("");
    if (line.points.length > 1)
      svg.append(draw("path", { d: path, "data-name": line.name, fill: "none", "stroke-width": line.width ?? 2, "stroke-dasharray": line.dash, "stroke-opacity": line.opacity, "stroke-linejoin": "round", "stroke-linecap": "round", style: `stroke:${line.colour}` }));
    if (line.dots)
      for (const [px, py] of line.points) {
        const [cx, cy] = place(px, py);
        svg.append(draw("circle", { cx, cy, r: line.dots, style: `fill:${line.colour}` }));
      }
  }
  for (const mark of spec.marks ?? []) {
    const [cx, cy] = place(mark.x, mark.y);
    if (mark.diamond) {
      const shape = draw("path", { d: `M${cx} ${cy - 7}L${cx + 7} ${cy}L${cx} ${cy + 7}L${cx - 7} ${cy}Z`, "stroke-width": 2, class: "se-diamond", style: `fill:var(--se-card);stroke:${mark.colour}` });
      const title = draw("title", {});
      title.textContent = mark.title ?? "";
      shape.append(title);
      svg.append(shape);
      continue;
    }
    svg.append(draw("circle", { cx, cy, r: mark.r ?? 5, "stroke-width": 2, style: `fill:${mark.colour};stroke:var(--se-card)` }));
    if (mark.label) {
      const right = cx > width - 84 || (mark.left && cx > pad.left + 84);
      svg.append(draw("text", { x: cx + (right ? -9 : 9), y: cy - 8 < pad.top + 8 ? cy + 18 : cy - 8, "text-anchor": right ? "end" : "start", class: "se-strong se-halo" }, mark.label));
    }
  }
  return { svg, place };
}

/** Round numbers for an axis from `low` to `high`: about `count` of them. */
function ticks(low, high, count = 4) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) found.push(Number(value.toPrecision(6)));
  return found;
}

/** Sparsity stretched towards 1: equal steps are equal factors of compression, so that 90 % and 99 % are as far apart as 0 % and 90 %. */
const compression = {
  domain: [0, 0.99],
  ticks: [[0, "0"], [0.5, "50"], [0.75, "75"], [0.9, "90"], [0.95, "95"], [0.98, "98"], [0.99, "99"]],
  map: (sparsity) => -Math.log10(1 - Math.min(sparsity, 0.9999)),
};

/** Call `redraw` when the width of `host` changes, and once at the start. */
function onResize(host, redraw, signal) {
  let width = 0;
  const observer = new ResizeObserver(() => {
    const now = Math.round(host.clientWidth);
    if (now && now !== width) {
      width = now;
      redraw();
    }
  });
  observer.observe(host);
  signal.addEventListener("abort", () => observer.disconnect());
}
