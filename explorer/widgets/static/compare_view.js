// Runs side by side: accuracy against measured latency, a table of figures, and any two of them layer by layer.

const HEIGHT = 432;
const NEAR = 26; // pixels within which a point is meant
// A run's place in the session chooses its shape and its colour: either tells it apart.
const SHAPES = [
  (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`, // circle
  (r) => `M${-0.88 * r} ${-0.88 * r}H${0.88 * r}V${0.88 * r}H${-0.88 * r}Z`, // square
  (r) => `M0 ${-1.15 * r}L${1.1 * r} ${0.8 * r}H${-1.1 * r}Z`, // triangle
  (r) => `M0 ${-1.25 * r}L${1.25 * r} 0L0 ${1.25 * r}L${-1.25 * r} 0Z`, // diamond
  (r) => `M0 ${1.15 * r}L${1.1 * r} ${-0.8 * r}H${-1.1 * r}Z`, // triangle that points down
  (r) => cross(r), // plus
  (r) => polygon(r * 1.1, 6), // hexagon
  (r) => star(r * 1.35), // star
];
const COLUMNS = [
  ["number", phrase("compare.column.run"), phrase("compare.column.run_tip")],
  ["status", phrase("compare.column.status"), phrase("compare.column.status_tip")],
  ["epochs", phrase("compare.column.epochs"), phrase("compare.column.epochs_tip")],
  ["accuracy", phrase("compare.column.accuracy"), phrase("compare.column.accuracy_tip")],
  ["change", phrase("compare.column.change"), phrase("compare.column.change_tip")],
  ["latency_ms", phrase("compare.column.latency"), phrase("compare.column.latency_tip")],
  ["speedup", phrase("compare.column.speedup"), phrase("compare.column.speedup_tip")],
  ["asked", phrase("compare.column.asked"), phrase("compare.column.asked_tip")],
  ["sparsity", phrase("compare.column.achieved"), phrase("compare.column.achieved_tip")],
  ["size_bytes", phrase("compare.column.size"), phrase("compare.column.size_tip")],
];
const STATUSES = {
  dense: phrase("compare.status.dense"), running: phrase("run.status.running"), paused: phrase("run.status.paused"), stopping: phrase("run.status.stopping"),
  done: phrase("run.status.done"), stopped: phrase("run.status.stopped"), failed: phrase("run.status.failed"),
};
const FIGURES = [
  ["accuracy", phrase("compare.figure.accuracy"), (one) => one.accuracy, (v) => `${(100 * v).toFixed(2)} %`, (a, b) => points(100 * (b - a), 2)],
  ["latency", phrase("compare.figure.latency"), (one) => one.latency_ms, (v) => `${words.ms(v)} ms`, (a, b) => factor(a, b, (times) => phrase("compare.faster", { times }), (times) => phrase("compare.slower", { times }))],
  ["speedup", phrase("compare.figure.speedup"), (one) => one.speedup, (v) => `${v.toFixed(2)} ×`, (a, b) => (signed(b - a, 2) === "0.00" ? phrase("compare.same") : `${signed(b - a, 2)} ×`)],
  ["sparsity", phrase("compare.figure.sparsity"), (one) => one.sparsity ?? one.asked, (v) => `${(100 * v).toFixed(2)} %`, (a, b) => points(100 * (b - a), 2)],
  ["size", phrase("compare.figure.size"), (one) => one.size_bytes, (v) => bytes(v), (a, b) => factor(a, b, (times) => phrase("compare.smaller", { times }), (times) => phrase("compare.larger", { times }))],
];

const change = (one) => (one.accuracy === null || one.dense_accuracy === null ? null : one.accuracy - one.dense_accuracy);
const signed = (value, digits) => (Number(value.toFixed(digits)) === 0 ? (0).toFixed(digits) : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`);
const points = (value, digits = 1) => phrase("compare.points", { points: signed(value, digits) });
const factor = (a, b, less, more) => (Math.max(a / b, b / a) < 1.005 ? phrase("compare.same") : b < a ? less((a / b).toFixed(2)) : more((b / a).toFixed(2)));
const bytes = (value) => (value >= 1e5 ? `${(value / 1e6).toPrecision(3)} MB` : `${(value / 1e3).toPrecision(3)} kB`);
const number = (value, digits = 0) => String(Number(value.toFixed(digits)));
const colour = (one) => (one.number ? `var(--se-run-${(one.number - 1) % SHAPES.length})` : "var(--se-ink)");
const shape = (one, r) => SHAPES[one.number ? (one.number - 1) % SHAPES.length : 0](r);

function cross(r) {
  const [long, thin] = [1.15 * r, 0.42 * r];
  return `M${-thin} ${-long}H${thin}V${-thin}H${long}V${thin}H${thin}V${long}H${-thin}V${thin}H${-long}V${-thin}H${-thin}Z`;
}

function polygon(r, corners, at = (i) => r) {
  const outline = Array.from({ length: corners }, (_, i) => {
    const angle = (2 * Math.PI * i) / corners - Math.PI / 2;
    return `${(at(i) * Math.cos(angle)).toFixed(2)} ${(at(i) * Math.sin(angle)).toFixed(2)}`;
  });
  return `M${outline.join("L")}Z`;
}

function star(r) {
  return polygon(r, 10, (i) => (i % 2 ? 0.45 * r : r));
}

function render({ model, el, signal }) {
  const root = section(el, phrase("compare.name"), "se-card se-compare", 5);
  const hint = make("p", { class: "se-hint" });
  const waiting = make("div", { class: "se-empty" }, make("b", {}, phrase("compare.empty")), make("p", {}, phrase("compare.empty_help")));

  // The chart
  const host = make("div", { class: "se-plot" });
  const tip = make("div", { class: "se-tip", hidden: true });
  const legend = make("div", { class: "se-legend", role: "group", "aria-label": phrase("compare.legend") });
  const spoken = make("p", { class: "se-hidden", role: "status" });
  const figure = make("figure", { class: "se-trade" },
    make("figcaption", {}, make("b", {}, phrase("compare.chart.title")), " ", make("span", {}, phrase("compare.chart.unit"))),
    make("div", { class: "se-trade-plot" }, host, tip), legend, spoken);

  // A beside B
  const picks = ["a", "b"].map((side) => {
    const select = make("select", { "aria-label": phrase("compare.pick", { side: side.toUpperCase() }), title: phrase("compare.pick_tip") });
    select.addEventListener("change", () => keep(side, select.value), { signal });
    return select;
  });
  const swap = button("⇄", () => {
    const [a, b] = pair().map((one) => one.key);
    keep("a", b);
    keep("b", a);
  }, signal, { class: "se-square", "aria-label": phrase("compare.swap"), title: phrase("compare.swap") });
  const figures = make("tbody");
  const told = make("p", { class: "se-told" });
  const byLayer = make("tbody");
  const sides = make("div", { class: "se-ab" },
    make("div", { class: "se-picks" }, make("b", { "data-side": "a", "aria-hidden": "true" }, "A"), picks[0], swap, make("b", { "data-side": "b", "aria-hidden": "true" }, "B"), picks[1]),
    make("table", { class: "se-figures" }, make("caption", { class: "se-hidden" }, phrase("compare.figures")), make("thead", {}, heads(["", "A", "B", phrase("compare.b_beside_a")])), figures),
    told,
    make("div", { class: "se-by-layer", tabindex: 0, role: "group", "aria-label": phrase("compare.layers_scrollable") },
      make("table", {}, make("caption", { class: "se-hidden" }, phrase("compare.layers_caption")), make("thead", {}, make("tr", {}, make("th", { scope: "col" }, phrase("compare.layer")), make("td", { class: "se-twin-head", "aria-hidden": "true" }), ...["A, %", "B, %", "B − A"].map((name) => make("th", { scope: "col", class: "se-num" }, name)))), byLayer)));

  // The table
  const columns = COLUMNS.map(([key, name, help], i) => {
    const mark = make("span", { class: "se-sort", "aria-hidden": "true" });
    const go = button("", () => sortBy(key), signal, { class: "se-plain", title: phrase("compare.sort_tip", { help }) });
    go.append(name, mark);
    return { key, mark, head: make("th", { scope: "col", class: i > 1 ? "se-num" : null }, go) };
  });
  const lastHead = make("td", {});
  const body = make("tbody");
  const table = make("div", { class: "se-scroll se-all", tabindex: 0, role: "group", "aria-label": phrase("compare.runs_scrollable") },
    make("table", {}, make("caption", { class: "se-hidden" }, phrase("compare.runs_caption")), make("thead", {}, make("tr", {}, ...columns.map((column) => column.head), lastHead)), body));

  const content = make("div", { class: "se-compare-body" }, make("div", { class: "se-compare-top" }, figure, sides), table);
  root.append(make("div", { class: "se-head" }, make("h2", {}, phrase("compare.name")), make("small", {}, phrase("compare.about"))), waiting, content, hint);

  let spots = []; // everything in the chart that can be pointed at: { one, x, y, title, lines }
  let width = 0;
  const rows = new Map();
  const keys = new Map();

  host.addEventListener("pointermove", (event) => show(nearest(event)), { signal });
  host.addEventListener("pointerleave", () => show(null), { signal });
  root.addEventListener("pointerdown", () => show(null), { signal });
  host.addEventListener("click", (event) => {
    const spot = nearest(event);
    show(spot); // a finger was not over it before
    if (spot?.one.number) choose(spot.one.key);
  }, { signal });
  onResize(host, update, signal);
  follow(model, ["view", "contestants", "a", "b", "chosen", "order"], update, signal);

  function all() {
    return model.get("contestants") ?? [];
  }
  function planned() {
    return model.get("view").planned ?? [];
  }
  function keep(name, value) {
    model.set(name, value);
    model.save_changes();
    update();
  }
  function choose(key) {
    keep("chosen", model.get("chosen") === key ? "" : key);
  }
  function sortBy(key) {
    const now = model.get("order");
    keep("order", now === key ? `-${key}` : key);
  }

  function update() {
    const view = model.get("view");
    const shown = Boolean(view.layers?.length && all().length);
    waiting.hidden = shown;
    content.hidden = !shown;
    say(hint, shown ? view.hint ?? "" : "");
    hint.hidden = !shown;
    if (!shown) return;
    paint();
    listLegend();
    listRows();
    compare();
  }

  // Chart

  function paint() {
    width = Math.max(260, host.clientWidth);
    const drawable = all().map((one) => ({ one, path: pathOf(one) })).filter(({ path }) => path.length);
    // Those that are kept by name are for the comparison beside: many lines could not be told apart.
    const upright = planned().filter((one) => one.latency_ms !== null && !one.key.startsWith("kept-"));
    const xs = [...drawable.flatMap(({ path }) => path.map(([x]) => x)), ...upright.map((one) => one.latency_ms)];
    const ys = drawable.flatMap(({ path }) => path.map(([, y]) => 100 * y));
    const [left, right] = xs.length ? [Math.min(...xs) / 1.16, Math.max(...xs) * 1.16] : [1, 10];
    const top = ys.length ? Math.min(100, Math.max(...ys) + 0.06 * Math.max(4, Math.max(...ys) - Math.min(...ys))) : 100;
    const bottom = ys.length ? Math.max(0, Math.min(...ys, Math.max(...ys) - 4) - 0.06 * Math.max(4, top - Math.min(...ys))) : 0;
    const runs = drawable.filter(({ one }) => one.number).length;
    const pad = { left: 46, right: 16, top: 44, bottom: 40 };
    const { svg, place } = chart({
      width, height: HEIGHT, pad,
      x: { domain: [left, right], ticks: xs.length ? logTicks(left, right, width / 62) : [], label: phrase("compare.axis"), map: Math.log },
      y: { domain: [bottom, top], ticks: ticks(bottom, top, 5).map((v) => [v, drawable.length ? number(v, 1) : ""]) },
      name: drawable.length > runs ? phrase("compare.chart.runs_and_dense", { count: runs }) : phrase("compare.chart.runs", { count: runs }),
    });
    spots = [];
    upright.forEach((one, row) => {
      const [x] = place(one.latency_ms, bottom);
      const y = 12 + 15 * row;
      const text = phrase("compare.planned.label", { name: one.name, latency: words.ms(one.latency_ms) });
      const room = text.length * 6.2;
      const back = x + room > width - 4;
      svg.append(
        draw("line", { x1: x, x2: x, y1: y + 5, y2: HEIGHT - pad.bottom, "data-planned": one.key, class: "se-upright" }),
        draw("text", { x: back ? Math.max(x - 6, Math.min(room, width - 4)) : x + 6, y: y + 4, "text-anchor": back ? "end" : "start", class: "se-halo" }, text));
      spots.push({ one, x, y: HEIGHT / 2, upright: true, title: one.name, lines: [foretold(one), phrase("compare.planned.no_accuracy")] });
    });
    const chosen = model.get("chosen");
    const labels = [];
    const ordered = [...drawable].sort((p, q) => Number(p.one.key === chosen) - Number(q.one.key === chosen));
    for (const { one, path } of ordered) {
      const group = draw("g", { "data-run": one.key, class: one.number ? "se-track" : "se-track se-dense", style: `color:${colour(one)}`, "data-dim": Boolean(chosen) && one.number > 0 && chosen !== one.key });
      const at = path.map(([x, y]) => place(x, 100 * y));
      const line = (from, to, dash) => draw("path", { d: at.slice(from, to).map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join(""), "stroke-dasharray": dash });
      // The result is timed and evaluated anew, on other images: it is joined, but not as if it were one more evaluation.
      const n = one.is_final ? path.length - 1 : path.length;
      if (n > 1) group.append(line(0, n, null));
      if (one.is_final && one.spread_ms) {
        const [y] = at.at(-1).slice(1);
        const [from, to] = [Math.max(left, one.latency_ms - one.spread_ms), Math.min(right, one.latency_ms + one.spread_ms)].map((ms) => place(ms, bottom)[0]);
        group.append(draw("path", { d: `M${from.toFixed(1)} ${y.toFixed(1)}H${to.toFixed(1)}`, class: "se-whisker" }));
      }
      if (one.is_final && path.length > 1) group.append(line(n - 1, n + 1, "2 4"));
      path.forEach(([ms, accuracy, epoch], i) => {
        const isResult = one.is_final && i === path.length - 1;
        const [x, y] = at[i];
        group.append(draw("path", { d: shape(one, isResult ? 7.5 : 3.4), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`, class: isResult ? "se-result-mark" : "se-dot-mark" }));
        spots.push({ one, x, y, isResult, title: one.name, lines: describe(one, ms, accuracy, epoch, isResult) });
      });
      svg.append(group);
      labels.push({ one, x: at.at(-1)[0], y: at.at(-1)[1] });
    }
    const taken = spots.filter((spot) => !spot.upright).map(({ x, y }) => [x - 5, y - 5, x + 5, y + 5]);
    for (const { one, x, y } of labels) {
      const text = one.short ? one.short : one.name.length > 18 ? `${one.name.slice(0, 17)}…` : one.name;
      const w = 6.6 * text.length;
      const boxes = [[x + 12, y - 8], [x - 12 - w, y - 8], [x - w / 2, y - 28], [x - w / 2, y + 12], [x + 10, y + 10], [x - 10 - w, y + 10], [x + 14, y - 24], [x - 14 - w, y - 24], [x + 14, y + 24], [x - 14 - w, y + 24]].map(([bx, by]) => [bx, by, bx + w, by + 16]);
      const clear = (box) => box[0] > pad.left && box[2] < width && box[1] > pad.top - 6 && box[3] < HEIGHT - pad.bottom && !taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3]);
      const box = boxes.find(clear) ?? boxes[x > width / 2 ? 1 : 0];
      taken.push(box);
      svg.append(draw("text", { x: box[0], y: box[1] + 12, class: "se-strong se-halo", style: `fill:${colour(one)}` }, text));
    }
    if (!xs.length) svg.append(draw("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle", class: "se-halo" }, phrase("compare.no_latency")));
    host.replaceChildren(svg);
  }

  function foretold(one) {
    const latency = words.ms(one.latency_ms);
    return one.speedup ? phrase("compare.planned.latency_and_speedup", { latency, speedup: one.speedup.toFixed(2) }) : phrase("compare.planned.latency", { latency });
  }

  /** Points of a contestant as [ms, accuracy, epoch], the result last. */
  function pathOf(one) {
    const path = [...(one.points ?? [])].map(([epoch, ms, accuracy]) => [ms, accuracy, epoch]);
    if (one.is_final) path.push([one.latency_ms, one.accuracy, null]);
    return path;
  }

  function describe(one, ms, accuracy, epoch, isResult) {
    const spread = isResult && one.spread_ms !== null ? ` ± ${words.spread(ms, one.spread_ms)}` : "";
    const times = isResult ? one.speedup : null;
    const lines = [`${(100 * accuracy).toFixed(2)} %, ${words.ms(ms)}${spread} ms${times && one.number ? `, ${times.toFixed(2)} ×` : ""}`];
    if (isResult && one.number && change(one) !== null) lines.push(phrase("compare.point.beside_dense", { difference: points(100 * change(one), 2) }));
    if (isResult) lines.push(one.images ? phrase("compare.point.on", { images: one.images }) : "");
    else lines.push(phrase("compare.point.after", { count: Number(number(epoch, 1)), epochs: number(epoch, 1) }));
    return lines.filter(Boolean);
  }

  function nearest(event) {
    const box = host.getBoundingClientRect();
    const [px, py] = [((event.clientX - box.left) * width) / box.width, event.clientY - box.top];
    const distance = (spot) => (spot.upright ? 3 * Math.abs(spot.x - px) : Math.hypot(spot.x - px, spot.y - py) - (spot.isResult ? 5 : 0)); // a large mark reaches farther
    const best = spots.reduce((found, spot) => (!found || distance(spot) < distance(found) ? spot : found), null);
    return best && distance(best) < NEAR ? best : null;
  }

  function show(spot) {
    tip.hidden = !spot;
    setOne(host, "data-over", spot?.one.number ? "yes" : null);
    if (!spot) return;
    const hidden = new Set(spots.filter((other) => !other.upright && other.one !== spot.one && Math.hypot(other.x - spot.x, other.y - spot.y) < 5).map((other) => other.title));
    const lines = hidden.size ? [...spot.lines, phrase("compare.also_here", { others: [...hidden].join("; ") })] : spot.lines;
    tip.replaceChildren(make("b", {}, spot.title), ...lines.map((line) => make("div", {}, line)));
    const scale = host.clientWidth / width;
    Object.assign(tip.style, { left: `${spot.x * scale}px`, top: `${spot.y}px`, transform: spot.x > width / 2 ? "translate(calc(-100% - 12px), -50%)" : "translate(12px, -50%)" });
  }

  function listLegend() {
    const runs = all().filter((one) => one.number);
    legend.hidden = !runs.length && !model.get("view").actions;
    for (const [key, entry] of keys)
      if (!runs.some((one) => one.key === key)) {
        entry.remove();
        keys.delete(key);
      }
    for (const one of runs) {
      if (!keys.has(one.key)) keys.set(one.key, legendEntry(one.key, one));
      const entry = keys.get(one.key);
      say(entry.lastElementChild, one.name);
      setOne(entry, "aria-pressed", String(model.get("chosen") === one.key));
      if (entry.parentElement !== legend) legend.append(entry);
    }
  }

  function legendEntry(key, one) {
    const entry = button("", () => choose(key), signal, { class: "se-run-key", title: phrase("compare.legend_tip") });
    entry.append(swatch(one), make("span", {}));
    let at = -1;
    const own = () => spots.filter((spot) => spot.one.key === key);
    const walk = (to, isSpoken) => {
      const mine = own();
      at = Math.max(0, Math.min(mine.length - 1, to));
      show(mine[at] ?? null);
      if (isSpoken && mine[at]) say(spoken, `${mine[at].title}, ${mine[at].lines.join(", ")}`);
    };
    entry.addEventListener("focus", () => { if (entry.matches(":focus-visible")) walk(Infinity, false); }, { signal });
    entry.addEventListener("blur", () => show(null), { signal });
    entry.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: Infinity };
      if (event.key === "Escape") show(null);
      else if (event.key in steps) walk(steps[event.key], true);
      else return;
      event.preventDefault();
    }, { signal });
    return entry;
  }

  function swatch(one) {
    const svg = draw("svg", { viewBox: "-9 -9 18 18", width: 16, height: 16, "aria-hidden": "true", class: "se-swatch", style: `color:${colour(one)}` });
    svg.append(draw("path", { d: shape(one, 6), class: one.number ? "se-result-mark" : "se-result-mark se-hollow" }));
    return svg;
  }

  // Table

  function listRows() {
    const view = model.get("view");
    const order = model.get("order") || "number";
    const [by, sign] = order.startsWith("-") ? [order.slice(1), -1] : [order, 1];
    const value = (one) => (by === "change" ? change(one) : one[by]);
    const compareTwo = (p, q) => {
      const [v, w] = [value(p), value(q)];
      // What nobody measured stands last, whichever way is up.
      if (v === null || w === null) return Number(v === null) - Number(w === null);
      return sign * (typeof v === "string" ? v.localeCompare(w) : v - w);
    };
    for (const column of columns) {
      const now = column.key === by;
      setOne(column.head, "aria-sort", now ? (sign > 0 ? "ascending" : "descending") : null);
      say(column.mark, now ? (sign > 0 ? "▲" : "▼") : "");
    }
    lastHead.hidden = !view.actions;
    const [dense, ...runs] = all();
    // The dense network stays on top: it is what all others are read against.
    const sorted = [dense, ...runs.sort(compareTwo)];
    for (const [key, line] of rows)
      if (!sorted.some((one) => one.key === key)) {
        line.remove();
        rows.delete(key);
      }
    sorted.forEach((one, i) => {
      if (!rows.has(one.key)) rows.set(one.key, makeRow(one));
      const line = rows.get(one.key);
      fillRow(line, one, view);
      if (body.children[i] !== line) body.insertBefore(line, body.children[i] ?? null);
    });
  }

  function makeRow(one) {
    const name = one.number ? button("", () => choose(one.key), signal, { class: "se-name", title: phrase("compare.choose_tip") }) : make("span", { class: "se-name" });
    name.append(swatch(one), make("span", {}));
    const actions = make("td", { class: "se-acts" });
    if (one.number)
      actions.append(
        button(phrase("compare.use"), () => model.send({ do: "use", run: one.number }), signal, { "aria-label": phrase("compare.use_run", { number: one.number }), title: phrase("compare.use_tip") }),
        button(phrase("compare.download"), () => model.send({ do: "pack", run: one.number }), signal, { "aria-label": phrase("compare.download_run", { number: one.number }) }));
    return make("tr", { "data-run": one.key }, make("th", { scope: "row" }, name), ...COLUMNS.slice(1).map((_, i) => make("td", { class: i ? "se-num" : null })), actions);
  }

  function fillRow(line, one, view) {
    const write = (value, text) => (value === null || value === undefined ? "–" : text(value));
    const isOn = model.get("chosen") === one.key;
    setOne(line, "class", isOn ? "se-selected" : null);
    const name = line.firstElementChild.firstElementChild;
    say(name.lastElementChild, one.name);
    setOne(name.lastElementChild, "title", one.name);
    if (one.number) setOne(name, "aria-pressed", String(isOn));
    const texts = [
      STATUSES[one.status],
      write(one.epochs, (v) => number(v, 1)),
      write(one.accuracy, (v) => (100 * v).toFixed(2)),
      one.number ? write(change(one), (v) => signed(100 * v, 2)) : "–",
      write(one.latency_ms, (v) => `${words.ms(v)}${one.spread_ms === null ? "" : ` ± ${words.spread(v, one.spread_ms)}`}`),
      write(one.speedup, (v) => v.toFixed(2)),
      write(one.asked, (v) => (100 * v).toFixed(2)),
      write(one.sparsity, (v) => (100 * v).toFixed(2)),
      write(one.size_bytes, bytes),
    ];
    texts.forEach((text, i) => say(line.children[i + 1], text));
    setOne(line.children[3], "title", one.images ? phrase("compare.measured_on", { images: one.images }) : null);
    const actions = line.lastElementChild;
    actions.hidden = !view.actions;
    const download = actions.lastElementChild;
    if (!download) return;
    const has = ["done", "stopped", "failed"].includes(one.status) && one.sparsity !== null;
    download.disabled = view.busy || !has;
    setOne(download, "title", has ? phrase("compare.download_tip") : phrase("compare.download_later"));
  }

  // A beside B

  function candidates() {
    return [...all(), ...planned()];
  }

  /** The two that are compared: what was chosen, else what tells most. */
  function pair() {
    const known = candidates();
    const find = (key) => known.find((one) => one.key === key);
    const runs = all().filter((one) => one.number);
    const usual = runs.length > 1 ? runs.slice(-2) : runs.length ? [find("uniform") ?? all()[0], runs[0]] : [find("uniform") ?? all()[0], find("here") ?? all()[0]];
    return ["a", "b"].map((side, i) => find(model.get(side)) ?? usual[i]);
  }

  function compare() {
    const view = model.get("view");
    const known = candidates();
    const [a, b] = pair();
    picks.forEach((select, i) => {
      const wanted = JSON.stringify(known.map((one) => [one.key, one.name]));
      if (select.dataset.known !== wanted) {
        select.dataset.known = wanted;
        select.replaceChildren(...known.map((one) => make("option", { value: one.key }, one.name)));
      }
      const key = [a, b][i].key;
      if (select.value !== key) select.value = key;
    });
    rewrite(figures, FIGURES.map(([figure, name, of, text, between]) => {
      const [v, w] = [of(a) ?? null, of(b) ?? null];
      const cell = (one, value) => {
        if (value === null) return figure === "accuracy" && one.status === "planned" ? phrase("compare.planned.accuracy_later") : "–";
        return one.status === "planned" && figure !== "sparsity" ? phrase("compare.planned.figure", { value: text(value) }) : text(value);
      };
      return [name, cell(a, v), cell(b, w), v === null || w === null ? "–" : between(v, w)];
    }), (cells) => cells);
    const lines = view.layers.map(([key, label]) => [label, a.sparsities[key] ?? null, b.sparsities[key] ?? null]);
    say(told, inWords(a, b, lines));
    rewrite(byLayer, lines, ([label, v, w]) => {
      const bar = (value, side) => make("i", { "data-side": side, style: `width:${100 * (value ?? 0)}%` });
      const write = (value) => (value === null ? "–" : (100 * value).toFixed(1));
      return [label, make("div", { class: "se-twin", "aria-hidden": "true" }, bar(v, "a"), bar(w, "b")), write(v), write(w), v === null || w === null ? "–" : signed(100 * (w - v), 1)];
    }, 1);
  }

  /** Fill a table body anew, but only when it differs. `bars` is the place of a cell that only shows what the numbers say. */
  function rewrite(into, lines, cells, bars = -1) {
    const key = JSON.stringify(lines);
    if (into.dataset.drawn === key) return;
    into.dataset.drawn = key;
    into.replaceChildren(...lines.map((line) => make("tr", {}, ...cells(line).map((cell, i) => (i === 0 ? make("th", { scope: "row", title: cell }, cell) : make("td", { class: i === bars ? "se-twin-cell" : "se-num" , "aria-hidden": i === bars ? "true" : null }, cell))))));
  }

  function inWords(a, b, lines) {
    if (a.key === b.key) return phrase("compare.told.same");
    const differ = lines.filter(([, v, w]) => v !== null && w !== null).map(([label, v, w]) => [label, 100 * (w - v)]);
    const more = differ.filter(([, d]) => d >= 0.05).sort((p, q) => q[1] - p[1]);
    const less = differ.filter(([, d]) => d <= -0.05).sort((p, q) => p[1] - q[1]);
    const same = differ.length - more.length - less.length;
    const parts = [];
    if (more.length) parts.push(phrase("compare.told.sparser", { count: more.length, layer: more[0][0], difference: points(more[0][1]) }));
    if (less.length) parts.push(phrase("compare.told.less_sparse", { count: less.length, layer: less[0][0], difference: points(less[0][1]) }));
    const [first, second] = parts;
    if (first === undefined) return phrase("compare.told.nowhere");
    if (second === undefined) return same ? phrase("compare.told.one_way_some_same", { how: first, count: same }) : phrase("compare.told.one_way", { how: first });
    return same ? phrase("compare.told.both_ways_some_same", { first, second, count: same }) : phrase("compare.told.both_ways", { first, second });
  }
}

function heads(names) {
  return make("tr", {}, ...names.map((name, i) => (name ? make("th", { scope: "col", class: i ? "se-num" : null }, name) : make("td", {}))));
}

/** Round numbers for a logarithmic axis, as many as `count` allows. */
function logTicks(low, high, count) {
  const sets = [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5, 7], [1, 2, 5], [1]];
  const within = (set) => {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const m of set) {
        const value = Number((m * 10 ** power).toPrecision(3));
        if (value >= low && value <= high) found.push(value);
      }
    return found;
  };
  // Over a narrow stretch a logarithm is nearly straight: even steps are rounder numbers there.
  const chosen = high / low < 2.2 ? ticks(low, high, Math.max(2, count)) : sets.map(within).find((found) => found.length <= count) ?? within([1]);
  return chosen.map((value) => [value, String(value)]);
}

export default { render };
