// The equalizer: one bar a layer. Height is its sparsity, width its share of the dense time, colour what pruning it costs.
// While a bar is dragged the page draws from its own copy and tells the kernel at most every SEND_MS; letting go commits.

const SEND_MS = 50;
const MAX = 0.99;
const TURNS = 1000; // positions of the target's dial

function render({ model, el, signal }) {
  const root = section(el, "Distribution", "se-card se-eq", 3);
  const gesture = (name, extra = {}) => model.send({ do: name, ...extra });

  // Tools
  const kinds = make("select", { "aria-label": "What to solve for", title: "Speed-up over the fastest dense run; latency of one call; zeros among the weights that can be pruned; size on disc; or how far outputs may be from the dense network's before training, as fast as that allows" });
  const range = make("input", { type: "range", min: 0, max: TURNS, step: TURNS / 200, "aria-label": "Target speed-up" });
  const target = make("input", { type: "text", inputmode: "decimal", size: 6, "aria-label": "Target speed-up, typed" });
  const unit = make("span", { class: "se-mute" }, "×");
  const limits = make("span", { class: "se-mute" });
  const solve = button("Solve", () => gesture("solve", { target: target.value }), signal, { class: "se-primary" });
  const uniform = button("Uniform", () => gesture("uniform"), signal, { title: "The same sparsity in all layers but the first and the last, at about the same latency" });
  const undo = button("↶", () => gesture("undo"), signal, { class: "se-square", "aria-label": "Undo", title: "Undo (Ctrl+Z)" });
  const redo = button("↷", () => gesture("redo"), signal, { class: "se-square", "aria-label": "Redo", title: "Redo (Ctrl+Y)" });
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
    make("h2", {}, make("span", { class: "se-no", "aria-hidden": "true" }, "3"), "Distribution"), origin,
    make("div", { class: "se-push" },
      make("span", { class: "se-target" }, make("span", { class: "se-mute", "aria-hidden": "true" }, "Target"), kinds, range, target, unit, limits),
      solve, uniform, undo, redo));

  // Bars
  const field = make("div", { class: "se-field", role: "group", "aria-label": "Sparsity of each layer. Left and right choose a layer, up and down change it." });
  const grid = make("div", { class: "se-gridlines", "aria-hidden": "true" }, ...[100, 75, 50, 25, 0].map((v) => make("span", { style: `bottom:${v}%` }, make("i", {}, `${v} %`))));
  const area = make("div", { class: "se-area" }, grid, field);
  const names = make("div", { class: "se-names", "aria-hidden": "true" });
  const tip = make("div", { class: "se-tip", hidden: true });
  const stage = make("div", { class: "se-stage" }, make("div", { class: "se-wide" }, area, names), tip);
  const empty = make("div", { class: "se-empty" }, make("b", {}, "No layers yet"), make("p", {}, "There will be one bar for each layer of the model."));

  // The chosen layer, as words and as a number to type
  const chosen = make("b", {});
  const typed = make("input", { type: "text", inputmode: "decimal", size: 6, id: `se-typed-${Math.random().toString(36).slice(2)}` });
  const lock = button("Lock", () => gesture("lock", { layer: current() }), signal, { title: "A locked layer keeps its sparsity when a target is solved (L)" });
  const effect = make("span", { class: "se-mute" });
  const readout = make("div", { class: "se-readout" }, chosen, make("label", { for: typed.id }, "Sparsity"), typed, make("span", { class: "se-mute" }, "%"), lock, effect);
  const commitTyped = () => gesture("type", { layer: current(), text: typed.value });
  typed.addEventListener("change", commitTyped, { signal });

  const ramp = make("span", { class: "se-ramp", "aria-hidden": "true" });
  const rampName = make("span", {}, "Colour: KL at this sparsity");
  const legend = make("div", { class: "se-foot" },
    make("span", {}, "Width: share of dense time"),
    make("span", { class: "se-rampline" }, rampName, make("em", {}, "0.003"), ramp, make("em", {}, "3")),
    make("span", {}, make("i", { class: "se-key-lock" }), "locked"),
    make("span", { "data-key": "ghost" }, make("i", { class: "se-key-ghost" }), "uniform at about the same latency"),
    make("span", { "data-key": "even" }, make("i", { class: "se-key-even" }), "break-even: below it the layer is not faster"));
  // For one-shot pruning: what harms least before training is not what trains best.
  const oneShot = make("input", { type: "checkbox", id: `se-one-shot-${Math.random().toString(36).slice(2)}` });
  const oneShotLabel = make("label", { for: oneShot.id, title: "For a network that stays as it is pruned: whole pruned networks of the same predicted latency are measured in the background, by how far their outputs are from the dense network's (batch norm refreshed), and the best is offered. Leave it off if you will train: on three networks what such a search found trained to 0.0 to 1.0 points less than what is solved" }, oneShot, "Will not be trained: search for less harm");
  oneShot.addEventListener("change", () => gesture("one_shot", { chosen: oneShot.checked }), { signal });
  const found = make("span", { class: "se-mute", role: "status" });
  const better = button("Take the better one", () => gesture("better"), signal, { title: "Adopt the distribution that the search has found; Undo brings this one back" });
  const offer = make("div", { class: "se-offer" }, oneShotLabel, found, better);
  root.append(tools, stage, empty, readout, legend, offer);

  let values = [];
  let layers = [];
  let harmName = "KL"; // what bars are coloured by
  let active = -1;
  let dragging = -1;
  let sentAt = 0;
  let timer = null;
  let edits = model.get("edit");

  const current = () => layers[active]?.name ?? "";

  follow(model, ["view", "curves"], update, signal);
  // What the kernel says counts once it has seen the last thing said here: an answer to an older edit would pull the bar back.
  const listen = () => {
    if (dragging >= 0 || model.get("edit") < edits) return;
    values = [...model.get("values")];
    repaint();
  };
  follow(model, ["values", "edit"], listen, signal);

  function update() {
    const view = model.get("view");
    const fresh = view.layers ?? [];
    const changed = fresh.length !== layers.length || fresh.some((layer, i) => layer.name !== layers[i].name);
    layers = fresh;
    stage.hidden = readout.hidden = legend.hidden = !layers.length;
    offer.hidden = !layers.length || !view.search?.able;
    oneShot.checked = Boolean(view.search?.on);
    oneShot.disabled = !view.search?.ready;
    say(found, view.search?.text ?? "");
    better.style.visibility = view.search?.better ? "visible" : "hidden";
    empty.hidden = Boolean(layers.length);
    if (changed) build();
    const at = layers.findIndex((layer) => layer.name === view.selected);
    if (at >= 0 && dragging < 0) active = at;
    const [low, high] = view.limits ?? [1, null];
    const { name, label, unit: sign, task } = kind();
    const kindChanged = unit.textContent !== sign;
    kinds.value = name;
    say(unit, sign);
    setOne(range, "aria-label", `Target ${label}`);
    setOne(target, "aria-label", `Target ${label}, typed`);
    kinds.disabled = range.disabled = target.disabled = solve.disabled = !view.solvable;
    if (kindChanged || (document.activeElement !== range && document.activeElement !== target && view.target !== undefined)) {
      range.value = String(toDial(view.target));
      target.value = written(view.target);
      setOne(range, "aria-valuetext", `${target.value} ${sign}`);
    }
    setOne(solve, "title", view.solvable ? task : view.why);
    const short = (number) => (number >= 100 || number === 0 ? number.toFixed(0) : Number(number.toPrecision(2)).toFixed(number >= 10 ? 0 : number >= 1 ? 1 : 3));
    say(limits, high === null ? "measure first" : `of ${short(low)} to ${short(high)}`);
    say(origin, view.origin ?? "");
    uniform.disabled = !layers.length;
    undo.disabled = !view.can_undo;
    redo.disabled = !view.can_redo;
    legend.querySelector("[data-key=ghost]").hidden = !layers.some((layer) => layer.ghost !== null);
    legend.querySelector("[data-key=even]").hidden = !layers.some((layer) => layer.even !== null);
    repaint();
  }

  function build() {
    active = Math.min(Math.max(active, 0), layers.length - 1);
    field.replaceChildren(...layers.map((layer, i) => {
      const bar = make("div", { class: "se-bar", role: "slider", "aria-orientation": "vertical", "aria-valuemin": 0, "aria-valuemax": 99, "data-index": i },
        make("i", { class: "se-fill" }), make("i", { class: "se-even" }), make("i", { class: "se-ghost" }), make("span", { class: "se-value", "aria-hidden": "true" }));
      return bar;
    }));
    names.replaceChildren(...layers.map((layer) => make("span", {}, make("em", {}, layer.label))));
    root.style.setProperty("--se-count", layers.length);
    setOne(root, "data-many", layers.length > 36 ? "yes" : null);
  }

  function repaint() {
    const curves = model.get("curves");
    harmName = model.get("view").harm ?? "KL";
    say(rampName, `Colour: ${harmName} at this sparsity`);
    layers.forEach((_, i) => paint(i, curves));
    tell();
  }

  /** Draw one bar from the page's own copy of the values; while a bar is dragged nothing else is touched. */
  function paint(i, curves) {
    const layer = layers[i];
    const bar = field.children[i];
    const name = names.children[i];
    if (!bar || values[i] === undefined) return;
    const value = values[i];
    const harm = between(curves.harm?.[i], value);
    const ms = between(curves.latency_ms?.[i], value);
    const grow = Math.max(layer.share ?? 1 / layers.length, 0.004);
    bar.style.flexGrow = name.style.flexGrow = grow;
    bar.style.setProperty("--se-at", value);
    bar.style.setProperty("--se-colour", rampColour(tone(harm)));
    setOne(bar, "data-locked", layer.locked ? "yes" : null);
    setOne(bar, "data-active", i === active ? "yes" : null);
    setOne(name, "data-active", i === active ? "yes" : null);
    const [, even, ghost, text] = bar.children;
    even.hidden = layer.even === null;
    if (layer.even !== null) even.style.bottom = `${100 * layer.even}%`;
    ghost.hidden = layer.ghost === null;
    if (layer.ghost !== null) ghost.style.bottom = `${100 * layer.ghost}%`;
    say(text, shortPercent(value, grow > 0.04));
    setAll(bar, {
      tabindex: i === active ? 0 : -1,
      "aria-label": layer.label,
      "aria-valuenow": Number((100 * value).toFixed(1)),
      "aria-valuetext": [words.percent(value), ms === null ? "" : `${words.ms(ms)} milliseconds`, harm === null ? "" : `${harmName} ${words.small(harm)}`, layer.locked ? "locked" : ""].filter(Boolean).join(", "),
      "aria-disabled": layer.locked ? "true" : null,
    });
  }

  /** Describe the chosen layer below the bars. */
  function tell() {
    const layer = layers[active];
    if (!layer) return;
    say(chosen, layer.label);
    if (document.activeElement !== typed) typed.value = (100 * (values[active] ?? 0)).toFixed(1);
    typed.disabled = Boolean(layer.locked);
    say(lock, layer.locked ? "Unlock" : "Lock");
    setOne(lock, "aria-pressed", String(Boolean(layer.locked)));
    say(effect, story(active));
  }

  /** One line on what the sparsity of a layer does to it. */
  function story(i) {
    const curves = model.get("curves");
    const [dense, ms] = [between(curves.latency_ms?.[i], 0), between(curves.latency_ms?.[i], values[i])];
    const harm = between(curves.harm?.[i], values[i]);
    const parts = [];
    if (dense !== null && ms !== null) parts.push(`${words.ms(dense)} → ${words.ms(ms)} ms`);
    if (harm !== null) parts.push(`${harmName} ${words.small(harm)}`);
    parts.push(`${words.count(Math.round(layers[i].n_params * (1 - values[i])))} of ${words.count(layers[i].n_params)} weights stay`);
    return parts.join(" · ");
  }

  /** A wide bar has room for a decimal, which matters near 100 %. */
  function shortPercent(value, wide) {
    return value === 0 ? "0" : (100 * value).toFixed(wide && value > 0.9 ? 1 : 0);
  }

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

  function choose(i, focus) {
    if (i < 0 || i >= layers.length) return;
    active = i;
    gesture("select", { layer: layers[i].name });
    repaint();
    if (focus) {
      field.children[i].focus({ preventScroll: true });
      field.children[i].scrollIntoView({ block: "nearest", inline: "nearest" });
    }
  }

  function change(i, value) {
    if (layers[i].locked) return false;
    values[i] = Math.min(MAX, Math.max(0, Math.round(value * 1000) / 1000));
    paint(i, model.get("curves"));
    tell();
    return true;
  }

  function showTip(i) {
    if (i < 0 || !layers[i] || values[i] === undefined) { tip.hidden = true; return; }
    const bar = field.children[i];
    tip.replaceChildren(make("b", {}, `${layers[i].label}  ${words.percent(values[i])}${layers[i].locked ? ", locked" : ""}`), story(i));
    tip.hidden = false;
    const [box, frame] = [bar.getBoundingClientRect(), stage.getBoundingClientRect()];
    const middle = box.left + box.width / 2 - frame.left;
    const left = Math.min(Math.max(4, middle - tip.offsetWidth / 2), frame.width - tip.offsetWidth - 4);
    const top = (1 - values[i]) * box.height + (box.top - frame.top);
    tip.style.left = `${left}px`;
    tip.style.top = `${top > tip.offsetHeight + 20 ? top - tip.offsetHeight - 22 : top + 16}px`;
  }

  const indexOf = (event) => Number(event.target.closest?.(".se-bar")?.dataset.index ?? -1);
  const valueAt = (event) => {
    const box = field.getBoundingClientRect();
    return 1 - (event.clientY - box.top) / box.height;
  };
  field.addEventListener("pointerdown", (event) => {
    const i = indexOf(event);
    if (i < 0 || event.button !== 0) return;
    event.preventDefault();
    choose(i, true);
    if (layers[i].locked) return;
    dragging = i;
    field.setPointerCapture(event.pointerId);
    setOne(field, "data-dragging", "yes");
    change(i, valueAt(event));
    showTip(i);
    send(false);
  }, { signal });
  field.addEventListener("pointermove", (event) => {
    if (dragging < 0) { showTip(indexOf(event)); return; }
    change(dragging, valueAt(event));
    showTip(dragging);
    send(false);
  }, { signal });
  const release = () => {
    if (dragging < 0) return;
    dragging = -1;
    setOne(field, "data-dragging", null);
    commit();
  };
  field.addEventListener("pointerup", release, { signal });
  field.addEventListener("pointercancel", release, { signal });
  field.addEventListener("pointerleave", () => { if (dragging < 0) tip.hidden = true; }, { signal });
  field.addEventListener("dblclick", (event) => { if (indexOf(event) >= 0) { typed.focus(); typed.select(); } }, { signal });
  field.addEventListener("focusout", () => { if (dragging < 0) tip.hidden = true; }, { signal });

  const STEPS = { ArrowUp: 0.01, ArrowDown: -0.01, PageUp: 0.1, PageDown: -0.1 };
  field.addEventListener("keydown", (event) => {
    const i = indexOf(event);
    if (i < 0) return;
    const { key } = event;
    if ((event.ctrlKey || event.metaKey) && (key === "z" || key === "y")) gesture(key === "z" ? "undo" : "redo");
    else if (event.ctrlKey || event.metaKey || event.altKey) return;
    else if (key === "ArrowLeft" || key === "ArrowRight") choose(i + (key === "ArrowRight" ? 1 : -1), true);
    else if (key in STEPS || key === "Home" || key === "End") {
      const to = key === "Home" ? 0 : key === "End" ? MAX : values[i] + STEPS[key] * (event.shiftKey ? 0.1 : 1);
      if (change(i, to)) { showTip(i); commit(); }
    } else if (key === "l" || key === "L") gesture("lock", { layer: layers[i].name });
    else if (key === "Enter") { typed.focus(); typed.select(); }
    else return;
    event.preventDefault();
  }, { signal });
}

export default { render };
