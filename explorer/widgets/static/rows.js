// Charts with one row a layer, in SVG: a heat map over sparsities, and horizontal bars. Put behind dom.js in front of the modules that draw.

const ROWS_PAD = { left: 128, right: 12, top: 6, bottom: 36 };
const READABLE = 10; // pixels that a row needs to be named

/** The frame that both share: rows with names, and an axis below. */
function rowsFrame({ width, height, rows, selected, axis, label, name }) {
  const pad = ROWS_PAD;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": name });
  const step = (height - pad.top - pad.bottom) / rows.length;
  const isNamed = step >= READABLE;
  const left = isNamed ? pad.left : 14;
  rows.forEach((row, i) => {
    row.group = draw("g", { "data-name": row.name });
    if (row.name === selected) row.group.append(draw("rect", { x: 2, y: pad.top + i * step, width: width - 4, height: step, class: "se-row-chosen" }));
    if (isNamed) {
      const short = row.label.length > 16 ? `…${row.label.slice(-15)}` : row.label;
      row.group.append(draw("text", { x: left - 8, y: pad.top + (i + 0.5) * step + 4, "text-anchor": "end", class: row.name === selected ? "se-strong" : null, style: `font-size:${Math.min(11.5, step - 0.5)}px` }, short));
    }
    svg.append(row.group);
  });
  for (const [x, text] of axis(left, width - pad.right)) svg.append(draw("text", { x, y: height - pad.bottom + 16, "text-anchor": "middle" }, text));
  svg.append(draw("text", { x: (left + width - pad.right) / 2, y: height - 4, "text-anchor": "middle" }, label));
  const rowAt = (y) => { const i = Math.floor((y - pad.top) / step); return i >= 0 && i < rows.length ? i : null; };
  return { svg, step, left, right: width - pad.right, top: pad.top, rowAt };
}

/**
 * Draw a heat map.
 *
 * spec.width, spec.height   pixels
 * spec.rows                 [{ name, label, colours: [colour or null] }], a colour for each column
 * spec.columns              [text]
 * spec.selected, spec.label, spec.name   name of the chosen row, of the columns, and what a screen reader says
 *
 * Returns the SVG, and `hit(x, y)`: `[row, column]` at a place, or null.
 */
function heatMap(spec) {
  const n = spec.columns.length;
  const centre = (left, right) => spec.columns.map((text, i) => [left + ((i + 0.5) * (right - left)) / n, text]);
  const frame = rowsFrame({ ...spec, axis: centre });
  const wide = (frame.right - frame.left) / n;
  spec.rows.forEach((row, i) => row.colours.forEach((colour, j) => {
    if (colour !== null) row.group.append(draw("rect", { x: frame.left + j * wide + 0.5, y: frame.top + i * frame.step + 0.5, width: wide - 1, height: Math.max(1, frame.step - 1), rx: Math.min(2, frame.step / 4), style: `fill:${colour}` }));
  }));
  const hit = (x, y) => {
    const [i, j] = [frame.rowAt(y), Math.floor((x - frame.left) / wide)];
    return i !== null && j >= 0 && j < n && spec.rows[i].colours[j] !== null ? [i, j] : null;
  };
  return { svg: frame.svg, hit, place: (i, j) => [frame.left + (j + 0.5) * wide, frame.top + (i + 0.5) * frame.step] };
}

/**
 * Draw horizontal bars.
 *
 * spec.rows       [{ name, label, value, whole, colour }]: `whole`, where it is given, is drawn as an outline behind
 * spec.axis       { domain: [a, b], ticks: [[value, text]], map }
 * The rest as for `heatMap`; `hit(x, y)` gives the row.
 */
function rowBars(spec) {
  const map = spec.scale.map ?? ((value) => value);
  const [a, b] = spec.scale.domain.map(map);
  const across = (left, right) => (value) => left + (Math.min(1, Math.max(0, (map(value) - a) / (b - a || 1)))) * (right - left);
  const frame = rowsFrame({ ...spec, axis: (left, right) => spec.scale.ticks.map(([value, text]) => [across(left, right)(value), text]) });
  const x = across(frame.left, frame.right);
  for (const [value] of spec.scale.ticks) frame.svg.prepend(draw("line", { x1: x(value), x2: x(value), y1: frame.top, y2: spec.height - ROWS_PAD.bottom, class: "se-axis" }));
  spec.rows.forEach((row, i) => {
    const bar = (value, props) => row.group.append(draw("rect", { x: frame.left, y: frame.top + i * frame.step + frame.step * 0.16, width: Math.max(1, x(value) - frame.left), height: Math.max(1, frame.step * 0.68), rx: 2, ...props }));
    if (row.whole !== undefined && row.whole !== null) bar(row.whole, { class: "se-row-whole" });
    if (row.value !== null) bar(row.value, { style: `fill:${row.colour}` });
  });
  return { svg: frame.svg, hit: (_, y) => frame.rowAt(y), place: (i) => [x(spec.rows[i].value ?? spec.scale.domain[0]), frame.top + (i + 0.5) * frame.step] };
}
