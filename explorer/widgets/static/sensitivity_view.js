// What pruning costs each layer, and what it gains in time, as measured: curves, a heat map, or bars at one sparsity.

const KINDS = {
  kl: { label: phrase("sensitivity.kind.kl"), title: phrase("sensitivity.kind.kl_title"), unit: phrase("sensitivity.kind.kl_unit") },
  accuracy: { label: phrase("sensitivity.kind.accuracy"), title: phrase("sensitivity.kind.accuracy_title"), unit: phrase("sensitivity.kind.accuracy_unit") },
  loss: { label: phrase("sensitivity.kind.loss"), title: phrase("sensitivity.kind.loss_title"), unit: phrase("sensitivity.kind.loss_unit") },
};
const IMAGES = [[100, phrase("sensitivity.images.quick")], [500, phrase("sensitivity.images.usual")], [2000, phrase("sensitivity.images.thorough")]];
const VIEWS = { curves: phrase("sensitivity.shape.curves"), heat: phrase("sensitivity.shape.heat"), bars: phrase("sensitivity.shape.bars") };
const HEIGHT = 278;

function render({ model, el, signal }) {
  const root = section(el, phrase("sensitivity.name"), "se-card se-sens", 2);
  let shape = "curves";
  let level = 0.9; // of the bars
  const shapes = make("div", { class: "se-seg", role: "group", "aria-label": phrase("sensitivity.shape.name") }, ...Object.entries(VIEWS).map(([key, label]) =>
    button(label, () => { shape = key; update(); }, signal, { "data-shape": key })));
  const levelInput = make("input", { type: "range", min: 0, max: 99, step: 1, value: 90, "aria-label": phrase("sensitivity.level"), title: phrase("sensitivity.level") });
  levelInput.addEventListener("input", () => { level = Number(levelInput.value) / 100; update(); }, { signal });
  const atText = make("output", { class: "se-mute", "aria-live": "off" });
  const atRow = make("span", { class: "se-at" }, levelInput, atText);
  const measure = button(phrase("sensitivity.measure"), () => model.send({ do: "measure", images: Number(images.value) }), signal, { class: "se-primary se-measure", title: phrase("sensitivity.measure_tip") });
  let kind = "kl";
  const images = make("select", { "aria-label": phrase("sensitivity.images.name"), title: phrase("sensitivity.images.tip") }, ...IMAGES.map(([count, label]) => make("option", { value: count }, label)));
  images.value = "500";
  const seg = make("div", { class: "se-seg", role: "group", "aria-label": phrase("sensitivity.kind.name") }, ...Object.entries(KINDS).map(([key, { label }]) =>
    button(label, () => { kind = key; update(); }, signal, { "data-kind": key })));
  const left = make("figure", {}, make("figcaption"), make("div", { class: "se-plot" }));
  const right = make("figure", {}, make("figcaption"), make("div", { class: "se-plot" }));
  const plots = make("div", { class: "se-pair" }, left, right);
  const about = make("p", {});
  const empty = make("div", { class: "se-empty" }, make("b", {}, phrase("sensitivity.empty")), about);
  const legend = make("p", { class: "se-hint se-key" });
  const source = make("p", { class: "se-hint se-source", hidden: true });
  root.append(make("div", { class: "se-head" }, make("h2", {}, make("span", { class: "se-no", "aria-hidden": "true" }, "2"), phrase("sensitivity.name")), make("div", { class: "se-push" }, images, measure)), make("div", { class: "se-shapes" }, shapes, seg, atRow), plots, legend, source, empty);

  for (const figure of [left, right]) {
    const host = figure.lastElementChild;
    onResize(host, update, signal);
    const tip = make("div", { class: "se-tip", hidden: true });
    figure.append(tip);
    host.addEventListener("pointermove", (event) => hover(figure, tip, event), { signal });
    host.addEventListener("pointerleave", () => { tip.hidden = true; tellPage(model, "point", null); }, { signal });
    // A finger is never over the chart before it taps, so that the place is looked up anew; what it reads stays until the next touch.
    host.addEventListener("click", (event) => {
      hover(figure, tip, event);
      if (figure.near) model.send({ do: "select", layer: figure.near });
    }, { signal });
    root.addEventListener("pointerdown", () => { tip.hidden = true; }, { signal });
  }

  let pointed = null; // the layer that is pointed at here or in another widget
  const point = () => { for (const path of plots.querySelectorAll("[data-name]")) setOne(path, "data-pointed", path.dataset.name === pointed ? "yes" : null); };
  hearPage(model, "point", (name) => { pointed = name; point(); }, signal);
  follow(model, ["view", "curves", "bands"], update, signal);

  function update() {
    const view = model.get("view");
    const curves = model.get("curves");
    const any = Object.keys(curves).length > 0;
    plots.hidden = legend.hidden = !any;
    empty.hidden = any;
    // Their places are kept.
    seg.style.visibility = shapes.style.visibility = any ? "visible" : "hidden";
    atRow.style.visibility = any && shape === "bars" ? "visible" : "hidden";
    say(atText, phrase("sensitivity.level_at", { sparsity: words.percent(level, 0) }));
    setOne(levelInput, "aria-valuetext", words.percent(level, 0));
    for (const choice of shapes.children) setOne(choice, "aria-pressed", String(choice.dataset.shape === shape));
    say(about, view.ready
      ? phrase("sensitivity.about")
      : phrase("sensitivity.no_model"));
    const goesOn = any && !view.measured && !view.busy;
    say(measure, goesOn ? phrase("sensitivity.continue") : any ? phrase("sensitivity.measure_again") : phrase("sensitivity.measure"));
    setOne(measure, "class", any && !goesOn ? "se-measure" : "se-primary se-measure");
    images.disabled = Boolean(view.busy);
    measure.disabled = Boolean(view.busy) || !view.ready;
    if (any && !(kind in curves)) kind = Object.keys(KINDS).find((key) => key in curves) ?? kind;
    for (const choice of seg.children) choice.hidden = any && !(choice.dataset.kind in curves);
    source.hidden = !view.provenance;
    say(source, view.provenance ?? "");
    images.hidden = Boolean(view.provenance);
    for (const choice of seg.children) setOne(choice, "aria-pressed", String(choice.dataset.kind === kind));
    if (!any) return;
    const at = view.layers.indexOf(view.selected);
    say(legend, shape !== "curves" ? LEGENDS[shape] : at < 0 ? "" : (model.get("bands") ?? {})[kind]?.[at]?.[0]?.length ? phrase("sensitivity.legend.curves_with_band", { layer: view.labels[at] }) : phrase("sensitivity.legend.curves", { layer: view.labels[at] }));
    const draws = { curves: paint, heat: paintHeat, bars: paintBars }[shape];
    draws(left, kind, curves, view);
    draws(right, "latency_ms", curves, view);
    point();
  }

  /** What a value is worth, in words. */
  const told = (what, value) =>
    what === "latency_ms" ? `${words.ms(value)} ms`
    : what === "accuracy" ? phrase("sensitivity.value.accuracy", { accuracy: (100 * value).toFixed(1) })
    : what === "kl" ? phrase("sensitivity.value.kl", { harm: words.small(value) })
    : phrase("sensitivity.value.loss", { loss: words.small(value) });

  /** Colour of a layer's value: the ramp for harm, the more of its dense time is left the stronger for time. */
  function shade(what, curve, value) {
    const dense = curve[0].length && curve[0][0] === 0 ? curve[1][0] : null;
    if (what === "kl") return rampColour(tone(value));
    if (what === "loss") return rampColour(dense === null ? null : tone(Math.max(1e-9, value - dense)));
    if (what === "accuracy") return rampColour(dense === null ? null : Math.min(1, Math.max(0, (dense - value) / Math.max(dense, 1e-9)) ** 0.5));
    return dense ? `color-mix(in oklab, var(--se-accent) ${(100 * Math.min(1, value / dense)).toFixed(0)}%, var(--se-sunk))` : "var(--se-edge)";
  }

  function show(figure, what, { svg, place }, hit) {
    figure.children[1].replaceChildren(svg);
    figure.place = place;
    figure.hit = hit;
    figure.width = Math.max(240, figure.children[1].clientWidth);
    figure.firstElementChild.replaceChildren(make("b", {}, figureTitle(what)), " ", make("span", {}, what === "latency_ms" ? phrase("sensitivity.latency.unit") : KINDS[what].unit));
  }

  const rowsOf = (view, all, more) => all.map((curve, i) => ({ name: view.layers[i], label: view.labels[i], ...more(curve, i) }));

  function paintHeat(figure, what, curves, view) {
    const all = curves[what] ?? [];
    // Levels that were added where one curve bends would be columns of holes; while it is measured there are holes anyway.
    const full = Math.max(...all.map((curve) => curve[0].length)) > 3 ? 0.9 : 0;
    const levels = [...new Set(all.flatMap((curve) => curve[0]))].sort((a, b) => a - b).filter((s) => all.filter((curve) => curve[0].includes(s)).length >= full * all.length);
    const valueAt = (i, j) => { const k = all[i][0].indexOf(levels[j]); return k < 0 ? null : all[i][1][k]; };
    const drawn = heatMap({
      width: Math.max(240, figure.children[1].clientWidth), height: HEIGHT, selected: view.selected, columns: levels.map((s) => String(Number((100 * s).toFixed(1)))),
      rows: rowsOf(view, all, (curve, i) => ({ colours: levels.map((_, j) => { const value = valueAt(i, j); return value === null ? null : shade(what, curve, value); }) })),
      label: phrase("sensitivity.axis"), name: phrase("sensitivity.chart.heat", { title: figureTitle(what) }),
    });
    show(figure, what, drawn, (x, y) => {
      const cell = drawn.hit(x, y);
      if (!cell) return null;
      const [i, j] = cell;
      return { at: drawn.place(i, j), name: view.layers[i], label: view.labels[i], text: phrase("sensitivity.at", { sparsity: words.percent(levels[j], 0), value: told(what, valueAt(i, j)) }) };
    });
  }

  function paintBars(figure, what, curves, view) {
    const all = curves[what] ?? [];
    const values = all.map((curve) => between(curve, level));
    const known = values.filter((value) => value !== null);
    const dense = all.map((curve) => between(curve, 0));
    const scale = axis(what, what === "latency_ms" ? dense.filter((value) => value !== null) : known);
    const shown = what === "accuracy" ? (value) => 100 * value : (value) => value;
    const drawn = rowBars({
      width: Math.max(240, figure.children[1].clientWidth), height: HEIGHT, selected: view.selected, scale,
      rows: rowsOf(view, all, (curve, i) => ({
        value: values[i] === null ? null : shown(values[i]),
        whole: what === "latency_ms" ? dense[i] : null,
        colour: what === "latency_ms" ? "var(--se-accent)" : values[i] === null ? "none" : shade(what, curve, values[i]),
      })),
      label: what === "latency_ms" ? phrase("sensitivity.latency.axis") : KINDS[what].unit, name: phrase("sensitivity.chart.bars", { title: figureTitle(what), sparsity: words.percent(level, 0) }),
    });
    show(figure, what, drawn, (x, y) => {
      const i = drawn.hit(x, y);
      if (i === null || values[i] === null) return null;
      const [sparsity, value] = [words.percent(level, 0), told(what, values[i])];
      const text = what === "latency_ms" && dense[i]
        ? phrase("sensitivity.at_with_gain", { sparsity, value, times: (dense[i] / values[i]).toFixed(1) })
        : phrase("sensitivity.at", { sparsity, value });
      return { at: drawn.place(i), name: view.layers[i], label: view.labels[i], text };
    });
  }

  function paint(figure, what, curves, view) {
    const host = figure.lastElementChild.classList.contains("se-plot") ? figure.lastElementChild : figure.children[1];
    const width = Math.max(240, host.clientWidth);
    const all = curves[what] ?? [];
    const chosen = view.layers.indexOf(view.selected);
    const from = what === "kl" ? 0.4 : 0; // of the x axis
    const shown = what === "kl" ? (v) => Math.max(v, 1e-4) : what === "accuracy" ? (v) => 100 * v : (v) => v;
    const values = all.flatMap((curve) => curve[1]).map(shown);
    const y = axis(what, values);
    const line = (curve, i) => ({
      points: curve[0].map((s, k) => [s, shown(curve[1][k])]).filter(([s]) => s >= from),
      colour: i === chosen ? "var(--se-accent)" : rampColour(tone(between(model.get("harm")?.[i], 0.9))),
      width: i === chosen ? 2.8 : 1.5,
      opacity: i === chosen ? 1 : 0.8,
      dots: i === chosen ? 2.8 : curve[0].length < 5 ? 2.2 : 0,
      name: view.layers[i],
      label: view.labels[i],
    });
    const lines = all.map(line).filter((entry) => entry.points.length);
    lines.sort((a, b) => a.width - b.width);
    const at = view.sparsities?.[chosen];
    const here = chosen >= 0 && all[chosen] && at !== undefined ? between(all[chosen], at) : null;
    const marks = here === null || at < from ? [] : [{ x: at, y: shown(here), colour: "var(--se-accent)", r: 6, label: what === "latency_ms" ? `${words.ms(here)} ms` : what === "accuracy" ? words.percent(here) : words.small(here) }];
    const even = what === "latency_ms" && chosen >= 0 ? view.evens?.[chosen] ?? null : null;
    if (even !== null && all[chosen]?.[0]?.length) marks.push({ x: even, y: between(all[chosen], even), colour: "var(--se-accent)", diamond: true, title: phrase("sensitivity.faster_from", { sparsity: words.percent(even, 0) }) });
    const band = (model.get("bands") ?? {})[what]?.[chosen];
    const areas = !band || chosen < 0 ? [] : [{ points: band[0].map((s, k) => [s, shown(band[1][k]), shown(band[2][k])]).filter(([s]) => s >= from), colour: "var(--se-accent)" }];
    const x = what === "kl" ? { ...compression, domain: [from, 0.99], ticks: compression.ticks.filter(([s]) => s >= 0.5) } : compression;
    const spec = { width, height: HEIGHT, pad: { top: 12, left: what === "kl" ? 56 : 46 }, x: { ...x, label: phrase("sensitivity.axis_by_compression") }, y, lines, areas, marks, name: phrase("sensitivity.chart.curves", { title: figureTitle(what) }) };
    const drawn = chart(spec);
    if (!lines.length) drawn.svg.append(draw("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle", class: "se-halo" }, phrase("sensitivity.waiting")));
    show(figure, what, drawn, (px, py) => {
      let best = null;
      for (const entry of lines)
        for (const [s, v] of entry.points) {
          const [x, y] = drawn.place(s, v);
          const distance = Math.hypot(x - px, y - py);
          if (distance < 28 && (!best || distance < best.distance))
            best = { distance, at: [x, y], name: entry.name, label: entry.label, text: phrase("sensitivity.at", { sparsity: words.percent(s, 0), value: told(what, what === "accuracy" ? v / 100 : v) }) };
        }
      return best;
    });
  }

  function figureTitle(what) {
    return what === "latency_ms" ? phrase("sensitivity.latency.title") : KINDS[what].title;
  }

  function axis(what, values) {
    const top = Math.max(...values, 0);
    if (what === "kl") {
      const decades = [1e-4, 1e-3, 0.01, 0.1, 1, 10].filter((v) => v <= Math.max(1, top * 1.6));
      return { domain: [1e-4, Math.max(1, top * 1.3)], ticks: decades.map((v) => [v, v === 1e-4 ? "≤ 0.0001" : String(v)]), map: Math.log10 };
    }
    const high = what === "accuracy" ? 100 : top * 1.08 || 1;
    return { domain: [0, high], ticks: ticks(0, high, 5).map((v) => [v, values.length ? String(v) : ""]) };
  }

  function hover(figure, tip, event) {
    if (!figure.hit) return;
    const box = figure.children[1].getBoundingClientRect();
    const best = figure.hit(((event.clientX - box.left) * figure.width) / box.width, event.clientY - box.top);
    tip.hidden = !best;
    figure.near = best?.name ?? null;
    if (figure.near !== pointed) tellPage(model, "point", figure.near);
    if (!best) return;
    tip.replaceChildren(make("b", {}, best.label), best.text);
    const [x, y] = best.at;
    const shift = x > 0.42 * box.width ? "translate(calc(-100% - 12px), -110%)" : "translate(12px, -110%)";
    Object.assign(tip.style, { left: `${(x * box.width) / figure.width}px`, top: `${y + figure.children[1].offsetTop}px`, transform: shift });
  }
}

const LEGENDS = {
  heat: phrase("sensitivity.legend.heat"),
  bars: phrase("sensitivity.legend.bars"),
};

export default { render };
