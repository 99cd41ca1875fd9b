// The equalizer: one bar a layer. Height is its sparsity, width its share of the dense time, colour what pruning it costs.
// While bars are dragged the page draws and predicts from its own copy, and tells the kernel at most every SEND_MS; letting go commits.

const SEND_MS = 50;
const MAX = 0.99;
const TURNS = 1000; // positions of the target's dial
const [LEAST_ZOOM, MOST_ZOOM] = [0.2, 16];
const SLOP = 6; // pixels that a finger moves before the bar does
const LETTER = 6.8; // pixels of a name, with some to spare
const BAR = 17; // pixels that a bar takes at least when nothing was narrowed

function render({ model, el, signal }) {
  const root = section(el, phrase("equalizer.name"), "se-card se-eq", 3);
  const gesture = (name, extra = {}) => model.send({ do: name, ...extra });

  // Target
  const kinds = make("select", { "aria-label": phrase("equalizer.target.kind"), title: phrase("equalizer.target.kind_tip") });
  const range = make("input", { type: "range", min: 0, max: TURNS, step: TURNS / 200 });
  const target = make("input", { type: "text", inputmode: "decimal", size: 6 });
  const unit = make("span", { class: "se-mute" }, "×");
  const limits = make("span", { class: "se-mute" });
  const solve = button(phrase("equalizer.target.solve"), () => gesture("solve", { target: target.value }), signal, { class: "se-primary" });
  const uniform = button(phrase("equalizer.uniform"), () => gesture("uniform"), signal, { title: phrase("equalizer.uniform_tip") });
  const undo = button("↶", () => gesture("undo"), signal, { class: "se-square", "aria-label": phrase("equalizer.undo"), title: phrase("equalizer.undo_tip") });
  const redo = button("↷", () => gesture("redo"), signal, { class: "se-square", "aria-label": phrase("equalizer.redo"), title: phrase("equalizer.redo_tip") });
  kinds.append(...model.get("target_kinds").map(({ name, label }) => make("option", { value: name }, label)));
  const kind = () => model.get("target_kinds").find(({ name }) => name === model.get("view").target_kind) ?? model.get("target_kinds")[0];
  const ends = () => model.get("view").limits ?? [1, 5];
  const fromDial = (position) => { const [low, high] = ends(); return low + (high - low) * (position / TURNS) ** kind().bend; };
  const toDial = (number) => { const [low, high] = ends(); return Math.round(TURNS * Math.min(1, Math.max(0, (number - low) / (high - low || 1))) ** (1 / kind().bend)); };
  const written = (number) => String(Number(Number(number).toFixed(kind().digits)));
  // While the dial turns the kernel solves from its tables, at most every SEND_MS; letting go has the solution checked on the engine.
  let turning = null;
  const stopTurning = () => { clearTimeout(turning); turning = null; };
  range.addEventListener("input", () => {
    target.value = written(fromDial(range.value));
    setOne(range, "aria-valuetext", `${target.value} ${kind().unit}`);
    if (turning === null && !solve.disabled) turning = setTimeout(() => { turning = null; gesture("turn", { target: target.value }); }, SEND_MS);
  }, { signal });
  range.addEventListener("change", () => { stopTurning(); if (!solve.disabled) gesture("solve", { target: target.value }); }, { signal });
  signal.addEventListener("abort", stopTurning);
  target.addEventListener("keydown", (event) => { if (event.key === "Enter" && !solve.disabled) gesture("solve", { target: target.value }); }, { signal });
  kinds.addEventListener("change", () => gesture("target", { kind: kinds.value }), { signal });
  const origin = make("small", {});
  const tools = make("div", { class: "se-head" },
    make("h2", {}, make("span", { class: "se-no", "aria-hidden": "true" }, "3"), phrase("equalizer.name")), origin,
    make("div", { class: "se-push" },
      make("span", { class: "se-target" }, make("span", { class: "se-mute", "aria-hidden": "true" }, phrase("equalizer.target.word")), kinds, range, target, unit, limits),
      solve, uniform, undo, redo));

  // Which layers, in which order, how wide
  const find = make("input", { type: "search", size: 15, placeholder: phrase("equalizer.find"), "aria-label": phrase("equalizer.find_name"), title: phrase("equalizer.find_tip") });
  const found = make("span", { class: "se-mute", role: "status" });
  const options = (pairs) => pairs.map(([value, label]) => make("option", { value }, label));
  const order = make("select", { "aria-label": phrase("equalizer.order.name"), title: phrase("equalizer.order.tip") }, ...options(ORDERS));
  const widths = make("select", { "aria-label": phrase("equalizer.width.name"), title: phrase("equalizer.width.tip") }, ...options(WIDTHS.map(([value, label]) => [value, phrase("equalizer.width.of", { what: label })])));
  const wider = button("+", () => zoomTo(zoom * 1.5), signal, { class: "se-square", "aria-label": phrase("equalizer.wider"), title: phrase("equalizer.wider_tip") });
  const narrower = button("−", () => zoomTo(zoom / 1.5), signal, { class: "se-square", "aria-label": phrase("equalizer.narrower"), title: phrase("equalizer.narrower_tip") });
  const draw = button(phrase("equalizer.draw"), () => { setOne(draw, "aria-pressed", String(!drawing())); setOne(field, "data-draw", drawing() ? "yes" : null); }, signal, { "aria-pressed": "false", title: phrase("equalizer.draw_tip") });
  const drawing = () => draw.getAttribute("aria-pressed") === "true";
  const layout = make("div", { class: "se-layout" }, find, found, make("span", { class: "se-push" }, order, widths, narrower, wider, draw));

  // Bars
  const field = make("div", { class: "se-field", role: "group", "aria-label": phrase("equalizer.bars") });
  const grid = make("div", { class: "se-gridlines", "aria-hidden": "true" }, ...[100, 75, 50, 25, 0].map((v) => make("span", { style: `bottom:${v}%` }, make("i", {}, `${v} %`))));
  const area = make("div", { class: "se-area" }, field);
  const blocks = make("div", { class: "se-blocks", role: "group", "aria-label": phrase("equalizer.blocks") });
  const labels = make("div", { class: "se-names", "aria-hidden": "true" });
  const tip = make("div", { class: "se-tip", hidden: true });
  const wide = make("div", { class: "se-wide" }, area, blocks, labels);
  const stage = make("div", { class: "se-stage" }, grid, wide, tip);
  const empty = make("div", { class: "se-empty" }, make("b", {}, phrase("equalizer.empty")), make("p", {}, phrase("equalizer.empty_help")));

  // The chosen layers, as words and as a number to type
  const chosen = make("b", {});
  const several = make("span", { class: "se-hidden", role: "status" }); // one layer is read out as the bar that has the focus
  const typed = make("input", { type: "text", inputmode: "decimal", size: 6, id: `se-typed-${Math.random().toString(36).slice(2)}` });
  const lock = button(phrase("equalizer.lock"), () => gesture("lock", { layers: pickedNames() }), signal, { title: phrase("equalizer.lock_tip") });
  const tie = button(phrase("equalizer.tie"), () => gesture("tie", { layers: pickedNames() }), signal, { title: phrase("equalizer.tie_tip") });
  const effect = make("span", { class: "se-mute" });
  const readout = make("div", { class: "se-readout" }, chosen, several, make("label", { for: typed.id }, phrase("equalizer.sparsity")), typed, make("span", { class: "se-mute" }, "%"), lock, tie, effect);
  typed.addEventListener("change", () => gesture("type", { layers: pickedNames(), text: typed.value }), { signal });

  const ramp = make("span", { class: "se-ramp", "aria-hidden": "true" });
  const rampName = make("span");
  const widthName = make("span", {});
  const ghostName = make("span", {});
  const legend = make("div", { class: "se-foot" },
    make("span", { class: "se-by-finger" }, phrase("equalizer.by_finger")),
    widthName,
    make("span", { class: "se-rampline" }, rampName, make("em", {}, "0.003"), ramp, make("em", {}, "3")),
    make("span", {}, make("i", { class: "se-key-lock" }), phrase("equalizer.bar.locked")),
    make("span", { "data-key": "ghost" }, make("i", { class: "se-key-ghost" }), ghostName),
    make("span", { "data-key": "even" }, make("i", { class: "se-key-even" }), phrase("equalizer.break_even")));
  const kept = keptRow(gesture, signal);
  // For one-shot pruning: what harms least before training is not what trains best.
  const oneShot = make("input", { type: "checkbox", id: `se-one-shot-${Math.random().toString(36).slice(2)}`, title: phrase("equalizer.search.tip") });
  const oneShotLabel = make("label", { for: oneShot.id, title: phrase("equalizer.search.tip") }, oneShot, phrase("equalizer.search.name"));
  oneShot.addEventListener("change", () => gesture("one_shot", { chosen: oneShot.checked }), { signal });
  const searched = make("span", { class: "se-mute", role: "status" });
  const better = button(phrase("equalizer.search.take"), () => gesture("better"), signal, { title: phrase("equalizer.search.take_tip") });
  const offer = make("div", { class: "se-offer" }, oneShotLabel, searched, better);
  root.append(tools, layout, stage, empty, readout, legend, kept.element, offer);

  let values = [];
  let layers = [];
  let bars = []; // by layer, as `names`; `line` has them in the order in which they stand
  let names = [];
  let room = []; // pixels that each bar is wide
  let line = [];
  let harmName = phrase("equalizer.harm.kl"); // what bars are coloured by
  let active = -1;
  let picked = new Set(); // layers that are chosen together, the active one among them
  let asked = null; // the layer that the kernel was asked to select, until it has
  let drag = null; // { i, y: where the pointer took it, from: values then, at: the last place of a stroke, by: whether bars move as far as the pointer, slack: where a finger came down, until it has moved }
  let tapped = -1; // the bar on which a finger lies that may yet scroll the page
  let zoom = 1;
  let sentAt = 0;
  let timer = null;
  let edits = model.get("edit");

  const pickedNames = () => [...picked].sort((a, b) => a - b).map((i) => layers[i].name);

  follow(model, ["view", "curves"], update, signal);
  // What the kernel says counts once it has seen the last thing said here: an answer to an older edit would pull the bar back.
  const listen = () => {
    if (drag || model.get("edit") < edits) return;
    values = [...model.get("values")];
    repaint();
    tellPage(model, "preview", null);
  };
  follow(model, ["values", "edit"], listen, signal);
  hearPage(model, "point", (name) => bars.forEach((bar, i) => setOne(bar, "data-pointed", layers[i].name === name ? "yes" : null)), signal);
  const observer = new ResizeObserver(placeBlocks);
  observer.observe(field);
  signal.addEventListener("abort", () => observer.disconnect());

  function update() {
    const view = model.get("view");
    const fresh = view.layers ?? [];
    const changed = fresh.length !== layers.length || fresh.some((layer, i) => layer.name !== layers[i].name);
    const timed = !changed && fresh.some((layer, i) => layer.share !== layers[i].share);
    layers = fresh;
    stage.hidden = layout.hidden = readout.hidden = legend.hidden = kept.element.hidden = !layers.length;
    offer.hidden = !layers.length || !view.search?.able;
    oneShot.checked = Boolean(view.search?.on);
    oneShot.disabled = !view.search?.ready;
    say(searched, view.search?.text ?? "");
    better.style.visibility = view.search?.better ? "visible" : "hidden";
    empty.hidden = Boolean(layers.length);
    if (changed) build();
    else if (timed && !drag) arrange();
    // A view that was on its way when a layer was chosen here knows nothing of that yet.
    if (view.selected === asked) asked = null;
    const at = layers.findIndex((layer) => layer.name === view.selected);
    if (at >= 0 && at !== active && !drag && asked === null) {
      active = at;
      if (!picked.has(at)) picked = new Set([at]);
    }
    const [low, high] = view.limits ?? [1, null];
    const { name, label, unit: sign, task } = kind();
    const kindChanged = unit.textContent !== sign;
    kinds.value = name;
    say(unit, sign);
    setOne(range, "aria-label", phrase("equalizer.target.of", { kind: label }));
    setOne(target, "aria-label", phrase("equalizer.target.typed", { kind: label }));
    kinds.disabled = range.disabled = target.disabled = solve.disabled = !view.solvable;
    if (kindChanged || (document.activeElement !== range && document.activeElement !== target && view.target !== undefined)) {
      range.value = String(toDial(view.target));
      target.value = written(view.target);
      setOne(range, "aria-valuetext", `${target.value} ${sign}`);
    }
    setOne(solve, "title", view.solvable ? task : view.why);
    const short = (number) => (number >= 100 ? number.toFixed(0) : String(Number(number.toPrecision(3))));
    say(limits, high === null ? phrase("equalizer.target.measure_first") : phrase("equalizer.target.range", { low: short(low), high: short(high) }));
    say(origin, view.origin ?? "");
    uniform.disabled = !layers.length;
    undo.disabled = !view.can_undo;
    redo.disabled = !view.can_redo;
    say(ghostName, view.compared || phrase("equalizer.ghost"));
    kept.update(view);
    legend.querySelector("[data-key=ghost]").hidden = !layers.some((layer) => layer.ghost !== null);
    legend.querySelector("[data-key=even]").hidden = !layers.some((layer) => layer.even !== null);
    repaint();
  }

  // ---- how the bars stand

  function build() {
    active = Math.min(Math.max(active, 0), layers.length - 1);
    picked = new Set(active >= 0 ? [active] : []);
    bars = layers.map((layer, i) => make("div", { class: "se-bar", role: "slider", "aria-orientation": "vertical", "aria-valuemin": 0, "aria-valuemax": 99, "data-index": i },
      make("i", { class: "se-fill" }), make("i", { class: "se-even" }), make("i", { class: "se-ghost" }), make("span", { class: "se-value", "aria-hidden": "true" }), make("i", { class: "se-grip" })));
    names = layers.map((layer) => make("span", {}, make("em", {}, layer.label)));
    root.style.setProperty("--se-count", layers.length);
    // The place of upright names is kept: bars get their widths only when they are timed.
    labels.style.minHeight = `${7 + Math.min(132, LETTER * Math.max(0, ...layers.map((layer) => layer.label.length)))}px`;
    setOne(root, "data-many", layers.length > 36 ? "yes" : null);
    find.value = "";
    arrange();
    lookUp();
    zoomTo(zoom);
  }

  /** Put the bars in the order that was asked for, as wide as was asked for. The focus stays where it is. */
  function arrange() {
    const focused = document.activeElement;
    line = arranged(layers, order.value, { harm: model.get("curves").harm, values });
    field.replaceChildren(...line.map((i) => bars[i]));
    labels.replaceChildren(...line.map((i) => names[i]));
    if (bars.includes(focused)) focused.focus({ preventScroll: true });
    const total = layers.reduce((sum, layer) => sum + layer.n_params, 0);
    layers.forEach((layer, i) => {
      const share = { time: layer.share ?? 1 / layers.length, weights: layer.n_params / total, equal: 1 / layers.length }[widths.value];
      bars[i].style.flexGrow = names[i].style.flexGrow = Math.max(share, 0.004);
    });
    say(widthName, phrase("equalizer.width.of", { what: WIDTHS.find(([value]) => value === widths.value)[2] }));
    const of = blocksOf(layers.map((layer) => layer.label));
    const found = order.value === "network" ? [...new Set(of)].filter((block) => block && of.filter((one) => one === block).length > 1) : [];
    blocks.replaceChildren(...found.map((block) => {
      const mine = of.flatMap((one, i) => (one === block ? [i] : []));
      const choose = button(block, () => pick(mine, mine[0], true), signal, { class: "se-block", "aria-label": block, "data-name": block, title: phrase("equalizer.choose_block", { count: mine.length, block }) });
      choose.dataset.first = mine[0];
      choose.dataset.last = mine.at(-1);
      return choose;
    }));
    placeBlocks();
  }

  function placeBlocks() {
    for (const block of blocks.children) {
      const [first, last] = [bars[block.dataset.first], bars[block.dataset.last]];
      block.style.left = `${first.offsetLeft}px`;
      const width = Math.max(14, last.offsetLeft + last.offsetWidth - first.offsetLeft);
      block.style.width = `${width}px`;
      // Names of neighbours differ in their last letters.
      const [name, fits] = [block.dataset.name, Math.floor(width / 6)];
      say(block, name.length <= fits ? name : `…${name.slice(name.length - Math.max(1, fits - 1))}`);
    }
    // A name lies flat where its bar is as wide as that, and stands upright elsewhere.
    room = bars.map((bar) => bar.offsetWidth);
    names.forEach((name, i) => setOne(name, "data-flat", LETTER * layers[i].label.length < room[i] ? "yes" : null));
    bars.forEach((bar, i) => { if (values[i] !== undefined) say(bar.querySelector(".se-value"), shortPercent(values[i], room[i])); });
  }
  for (const choice of [order, widths]) choice.addEventListener("change", () => { arrange(); repaint(); }, { signal });

  /** Widen the bars; what is under `x` (pixels from the left of the window) stays there. */
  function zoomTo(next, x = null) {
    const before = zoom;
    // Below 1 the bars are narrower than is comfortable, until all of them are in view.
    const least = Math.min(1, Math.max(LEAST_ZOOM, wide.clientWidth / (BAR * layers.length || 1)));
    zoom = Math.min(MOST_ZOOM, Math.max(least, next));
    if (Math.abs(zoom - 1) < 0.02) zoom = 1;
    const box = wide.getBoundingClientRect();
    const at = (x === null ? box.width / 2 : x - box.left) + wide.scrollLeft;
    root.style.setProperty("--se-zoom", zoom);
    wide.scrollLeft += at * (zoom / before - 1);
    narrower.disabled = zoom <= least;
    setOne(root, "data-narrow", zoom < 0.8 ? "yes" : null);
    wider.disabled = zoom === MOST_ZOOM;
  }
  wide.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoomTo(zoom * 1.2 ** (event.deltaY < 0 ? 1 : -1), event.clientX);
  }, { signal, passive: false });

  /** Show what is found by the name that was typed. */
  function lookUp() {
    const text = find.value.trim();
    const hits = new Set(meant(layers.map((layer) => layer.label), text));
    bars.forEach((bar, i) => { setOne(bar, "data-dim", text && !hits.has(i) ? "yes" : null); setOne(names[i], "data-dim", text && !hits.has(i) ? "yes" : null); });
    say(found, text ? phrase("equalizer.found", { found: hits.size, total: layers.length }) : "");
    return [...hits];
  }
  find.addEventListener("input", () => {
    const hits = lookUp();
    if (find.value.trim() && hits.length) bars[hits[0]].scrollIntoView({ block: "nearest", inline: "center" });
  }, { signal });
  find.addEventListener("keydown", (event) => {
    const hits = event.key === "Enter" && find.value.trim() ? lookUp() : [];
    if (hits.length) pick(hits, hits[0], true);
  }, { signal });

  // ---- drawing

  function repaint() {
    const curves = model.get("curves");
    harmName = model.get("view").harm ?? phrase("equalizer.harm.kl");
    say(rampName, phrase("equalizer.colour", { harm: harmName }));
    layers.forEach((_, i) => paint(i, curves));
    tell();
  }

  /** Draw one bar from the page's own copy of the values. */
  function paint(i, curves) {
    const [layer, bar, value] = [layers[i], bars[i], values[i]];
    if (!bar || value === undefined) return;
    const harm = between(curves.harm?.[i], value);
    const ms = between(curves.latency_ms?.[i], value);
    bar.style.setProperty("--se-at", value);
    bar.style.setProperty("--se-colour", rampColour(tone(harm)));
    setOne(bar, "data-locked", layer.locked ? "yes" : null);
    setOne(bar, "data-tied", layer.group !== null ? "yes" : null);
    for (const element of [bar, names[i]]) {
      setOne(element, "data-active", i === active ? "yes" : null);
      setOne(element, "data-picked", picked.size > 1 && picked.has(i) ? "yes" : null);
    }
    const [, even, ghost, text] = bar.children;
    even.hidden = layer.even === null;
    if (layer.even !== null) even.style.bottom = `${100 * layer.even}%`;
    ghost.hidden = layer.ghost === null;
    if (layer.ghost !== null) ghost.style.bottom = `${100 * layer.ghost}%`;
    say(text, shortPercent(value, room[i]));
    const state = [layer.locked && phrase("equalizer.bar.locked"), layer.group !== null && phrase("equalizer.bar.tied"), picked.size > 1 && picked.has(i) && phrase("equalizer.bar.chosen")];
    setAll(bar, {
      tabindex: i === active ? 0 : -1,
      "aria-label": layer.label,
      "aria-valuenow": Number((100 * value).toFixed(1)),
      "aria-valuetext": [words.percent(value), ms === null ? "" : phrase("equalizer.bar.latency", { latency: words.ms(ms) }), harm === null ? "" : phrase("equalizer.bar.harm", { kind: harmName, harm: words.small(harm) }), ...state].filter(Boolean).join(", "),
      "aria-disabled": layer.locked ? "true" : null,
    });
  }

  /** Describe the chosen layers below the bars. */
  function tell() {
    const layer = layers[active];
    if (!layer) return;
    const all = [...picked].map((i) => layers[i]);
    say(chosen, picked.size > 1 ? phrase("equalizer.layers_chosen", { count: picked.size }) : layer.label);
    say(several, picked.size > 1 ? chosen.textContent : "");
    if (document.activeElement !== typed) typed.value = (100 * (values[active] ?? 0)).toFixed(1);
    const isLocked = all.every((one) => one.locked);
    typed.disabled = all.some((one) => one.locked);
    say(lock, isLocked ? phrase("equalizer.unlock") : phrase("equalizer.lock"));
    setOne(lock, "aria-pressed", String(isLocked));
    const isTied = layer.group !== null && all.every((one) => one.group === layer.group);
    say(tie, isTied ? phrase("equalizer.untie") : phrase("equalizer.tie"));
    tie.disabled = !isTied && picked.size < 2;
    say(effect, story([...picked]));
  }

  /** One line on what the sparsities of some layers do to them. */
  function story(some) {
    const curves = model.get("curves");
    const sum = (of) => some.reduce((total, i) => { const one = of(i); return total === null || one === null ? null : total + one; }, 0);
    const [dense, ms] = [sum((i) => between(curves.latency_ms?.[i], 0)), sum((i) => between(curves.latency_ms?.[i], values[i]))];
    const harm = sum((i) => between(curves.harm?.[i], values[i]));
    const parts = [];
    if (dense !== null && ms !== null) parts.push(phrase("equalizer.story.latency", { dense: words.ms(dense), latency: words.ms(ms) }));
    if (harm !== null && some.length > 1) parts.push(phrase("equalizer.story.harm_one_by_one", { kind: harmName, harm: words.small(harm) }));
    else if (harm !== null) parts.push(phrase("equalizer.story.harm", { kind: harmName, harm: words.small(harm) }));
    const n = some.reduce((total, i) => total + layers[i].n_params, 0);
    const stay = Math.round(some.reduce((total, i) => total + layers[i].n_params * (1 - values[i]), 0));
    parts.push(phrase("equalizer.story.weights", { stay: words.count(stay), total: words.count(n) }));
    return parts.join(" · ");
  }

  /** A bar of some `width` in pixels has room for a decimal, which matters near 100 %. */
  function shortPercent(value, width) {
    return value === 0 ? "0" : (100 * value).toFixed(width > 5 * LETTER && value > 0.9 ? 1 : 0);
  }

  // ---- what the kernel hears

  function send(now) {
    clearTimeout(timer);
    const wait = sentAt + SEND_MS - performance.now();
    if (!now && wait > 0) {
      timer = setTimeout(() => send(true), wait);
      return;
    }
    sentAt = performance.now();
    model.set("drag", { values: [...values], edit: edits });
    model.save_changes();
  }

  function commit() {
    clearTimeout(timer);
    edits += 1;
    gesture("commit", { values: [...values], edit: edits });
  }

  /** Choose some layers, one of which is the active one. Under a hand nothing may scroll: `scroll` is for keys and names. */
  function pick(some, i, scroll) {
    if (i === undefined || !layers[i]) return;
    picked = new Set([...some, i]);
    if (i !== active) {
      asked = layers[i].name === model.get("view").selected ? null : layers[i].name;
      gesture("select", { layer: layers[i].name });
    }
    active = i;
    repaint();
    bars[i].focus({ preventScroll: true });
    if (scroll) bars[i].scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** Layers from `a` to `b` as they stand. */
  function stretch(a, b) {
    const [from, to] = [line.indexOf(a), line.indexOf(b)].sort((x, y) => x - y);
    return line.slice(from, to + 1);
  }

  /** Give some layers new sparsities, `[[layer, sparsity]]`, and those that are tied to them; says whether any could move. */
  function change(some) {
    const curves = model.get("curves");
    const moved = new Map();
    for (const [i, value] of some) {
      const tied = layers[i].group === null ? [i] : layers.flatMap((layer, j) => (layer.group === layers[i].group ? [j] : []));
      if (tied.some((j) => layers[j].locked)) continue;
      for (const j of tied) moved.set(j, Math.min(MAX, Math.max(0, Math.round(value * 1000) / 1000)));
    }
    for (const [i, value] of moved) { values[i] = value; paint(i, curves); }
    tell();
    const tables = model.get("tables");
    if (moved.size && tables?.n_params) tellPage(model, "preview", predict(tables, values));
    return moved.size > 0;
  }

  function showTip(i) {
    if (i < 0 || !layers[i] || values[i] === undefined) { tip.hidden = true; return; }
    const [layer, sparsity] = [layers[i].label, words.percent(values[i])];
    tip.replaceChildren(make("b", {}, layers[i].locked ? phrase("equalizer.tip_locked", { layer, sparsity }) : phrase("equalizer.tip", { layer, sparsity })), story([i]));
    tip.hidden = false;
    const [box, frame] = [bars[i].getBoundingClientRect(), stage.getBoundingClientRect()];
    const middle = box.left + box.width / 2 - frame.left;
    const left = Math.min(Math.max(4, middle - tip.offsetWidth / 2), frame.width - tip.offsetWidth - 4);
    const top = (1 - values[i]) * box.height + (box.top - frame.top);
    tip.style.left = `${left}px`;
    tip.style.top = `${top > tip.offsetHeight + 20 ? top - tip.offsetHeight - 22 : top + 16}px`;
  }

  // ---- the hand

  const indexOf = (event) => Number(event.target.closest?.(".se-bar")?.dataset.index ?? -1);
  const valueAt = (event) => {
    const box = field.getBoundingClientRect();
    return 1 - (event.clientY - box.top) / box.height;
  };

  /** Move the bars to where the pointer is: the one that was taken, with those that are chosen with it as far, or those that a stroke passes. */
  function pull(event) {
    const to = valueAt(event);
    if (drag.slack !== null) {
      if (Math.abs(event.clientY - drag.slack) < SLOP) return;
      drag.slack = null;
    }
    if (!drag.at) {
      // One bar comes to the pointer; several move as far as it does.
      const by = to - (drag.by ? drag.y : drag.from[drag.i]);
      change([...picked].map((j) => [j, drag.from[j] + by]));
      showTip(drag.i);
    } else {
      const here = { x: event.clientX, y: to };
      const [left, right] = drag.at.x < here.x ? [drag.at, here] : [here, drag.at];
      const height = (x) => (right.x - left.x < 1 ? to : left.y + ((right.y - left.y) * (x - left.x)) / (right.x - left.x));
      const boxes = line.map((i) => [i, bars[i].getBoundingClientRect()]).filter(([, box]) => box.right >= left.x && box.left <= right.x);
      change(boxes.map(([i, box]) => [i, height(Math.min(right.x, Math.max(left.x, (box.left + box.right) / 2)))]));
      drag.at = here;
    }
    send(false);
  }

  field.addEventListener("pointerdown", (event) => {
    const i = indexOf(event);
    if (i < 0 || event.button !== 0) return;
    event.preventDefault();
    if (event.ctrlKey || event.metaKey) {
      const others = [...picked].filter((j) => j !== i);
      if (picked.has(i) && others.length) pick(others, others.at(-1), false);
      else pick([...picked, i], i, false);
      return;
    }
    if (event.shiftKey) { pick(stretch(active, i), i, false); return; }
    const isStroke = drawing() || event.altKey;
    // A finger that passes over the bars scrolls the page. It chooses a bar with a tap, and pulls one that is chosen, or any by its upper end.
    const byFinger = event.pointerType === "touch";
    if (byFinger && !isStroke && !picked.has(i) && !event.target.classList.contains("se-grip")) { tapped = i; return; }
    pick(!isStroke && picked.has(i) ? [...picked] : [i], i, false);
    if (!isStroke && layers[i].locked) return;
    drag = { i, y: valueAt(event), from: [...values], at: isStroke ? { x: event.clientX, y: valueAt(event) } : null, by: byFinger || picked.size > 1, slack: byFinger && !isStroke ? event.clientY : null };
    field.setPointerCapture(event.pointerId);
    setOne(field, "data-dragging", "yes");
    pull(event);
  }, { signal });
  let pointed = null;
  const pointAt = (i) => {
    const name = layers[i]?.name ?? null;
    if (name === pointed) return;
    pointed = name;
    tellPage(model, "point", name);
  };
  field.addEventListener("pointermove", (event) => {
    if (drag) { pull(event); return; }
    if (tapped >= 0) return;
    showTip(indexOf(event));
    pointAt(indexOf(event));
  }, { signal });
  const release = (event) => {
    if (tapped >= 0 && event.type === "pointerup" && indexOf(event) === tapped) { pick([tapped], tapped, false); showTip(tapped); }
    tapped = -1;
    if (!drag) return;
    // What was taken from the hand half-way is put back.
    if (event.type === "pointercancel") { values = [...drag.from]; repaint(); tip.hidden = true; }
    // A click that did not move leaves several chosen layers as they are, and chooses the one.
    const { i, from, at } = drag;
    const stayed = !at && from.every((value, j) => value === values[j]);
    drag = null;
    setOne(field, "data-dragging", null);
    if (stayed && event.type === "pointerup" && picked.size > 1) pick([i], i, false);
    commit();
  };
  field.addEventListener("pointerup", release, { signal });
  field.addEventListener("pointercancel", release, { signal });
  field.addEventListener("pointerleave", () => { if (!drag) { tip.hidden = true; pointAt(-1); } }, { signal });
  field.addEventListener("dblclick", (event) => { if (indexOf(event) >= 0) { typed.focus(); typed.select(); } }, { signal });
  field.addEventListener("focusout", () => { if (!drag) tip.hidden = true; }, { signal });

  const STEPS = { ArrowUp: 0.01, ArrowDown: -0.01, PageUp: 0.1, PageDown: -0.1 };
  field.addEventListener("keydown", (event) => {
    const i = indexOf(event);
    if (i < 0) return;
    if (!picked.has(i)) pick([i], i, false);
    const { key } = event;
    const command = event.ctrlKey || event.metaKey;
    if (command && (key === "z" || key === "y")) gesture(key === "z" ? "undo" : "redo");
    else if (command && key === "a") pick(find.value.trim() ? lookUp() : line, i, true);
    else if (command || event.altKey) return;
    else if (key === "Escape") pick([i], i, true);
    else if (key === "ArrowLeft" || key === "ArrowRight") {
      const next = line[line.indexOf(i) + (key === "ArrowRight" ? 1 : -1)];
      pick(event.shiftKey ? [...picked, next].filter((j) => j !== undefined) : [next], next, true);
    } else if (key in STEPS || key === "Home" || key === "End") {
      const to = (j) => (key === "Home" ? 0 : key === "End" ? MAX : values[j] + STEPS[key] * (event.shiftKey ? 0.1 : 1));
      if (change([...picked].map((j) => [j, to(j)]))) { showTip(i); commit(); }
    } else if (key === "l" || key === "L") gesture("lock", { layers: pickedNames() });
    else if (key === "Enter") { typed.focus(); typed.select(); }
    else return;
    event.preventDefault();
  }, { signal });
}

export default { render };
