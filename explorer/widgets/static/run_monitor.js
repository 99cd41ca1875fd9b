// One pruning run, live: three charts over the same epochs, each with a second face, and the schedule, which is drawn by hand before the start.

const HEIGHT = 214;
const MORE = [
  ["learning_rate", phrase("monitor.field.learning_rate"), phrase("monitor.field.learning_rate_tip")],
  ["stabilise", phrase("monitor.field.stabilise"), phrase("monitor.field.stabilise_tip")],
  ["ramp", phrase("monitor.field.ramp"), phrase("monitor.field.ramp_tip")],
  ["update_every", phrase("monitor.field.update_every"), phrase("monitor.field.update_every_tip")],
  ["seed", phrase("monitor.field.seed"), phrase("monitor.field.seed_tip")],
];
// Two faces of each chart: key, name, unit, what it teaches.
const FACES = [
  [
    ["accuracy", phrase("monitor.face.accuracy"), phrase("monitor.face.accuracy_unit"), phrase("monitor.face.accuracy_tip")],
    ["loss", phrase("monitor.face.loss"), phrase("monitor.face.loss_unit"), phrase("monitor.face.loss_tip")],
  ],
  [
    ["sparsity", phrase("monitor.face.sparsity"), phrase("monitor.face.sparsity_unit"), phrase("monitor.face.sparsity_tip")],
    ["layers", phrase("monitor.face.layers"), phrase("monitor.face.layers_unit"), phrase("monitor.face.layers_tip")],
  ],
  [
    ["latency", phrase("monitor.face.latency"), phrase("monitor.face.latency_unit"), phrase("monitor.face.latency_tip")],
    ["stored", phrase("monitor.face.stored"), phrase("monitor.face.stored_unit"), phrase("monitor.face.stored_tip")],
  ],
];
const SHARE_STEP = 0.01;
const RATE_LABEL_Y = 118; // pixels from the top: at the right end the learning rate is far below, and the sparsity above
const LIMITS = { epochs: [0.1, 1000], stabilise: [0, 0.9], ramp: [0, 1] };

function render({ model, el, signal }) {
  const root = section(el, phrase("monitor.name"), "se-card se-run", 4);
  const title = make("small", {});
  const fields = { epochs: field("epochs", phrase("monitor.field.epochs"), phrase("monitor.field.epochs_tip")) };
  const more = make("div", { class: "se-more", id: `se-more-${Math.random().toString(36).slice(2)}`, hidden: true });
  for (const [name, label, help] of MORE) {
    fields[name] = field(name, label, help);
    more.append(fields[name].parentElement);
  }
  const expand = button(phrase("monitor.settings"), () => {
    more.hidden = !more.hidden;
    setOne(expand, "aria-expanded", String(!more.hidden));
  }, signal, { "aria-expanded": "false", "aria-controls": more.id, title: phrase("monitor.settings_tip") });
  const start = button(phrase("monitor.start"), () => model.send({ do: "start", options: typed() }), signal, { class: "se-primary" });
  const pause = button(phrase("monitor.pause"), () => model.send({ do: pause.dataset.act }), signal, { title: phrase("monitor.pause_tip") });
  const stop = button(phrase("monitor.stop"), () => model.send({ do: "stop" }), signal, { title: phrase("monitor.stop_tip") });
  const charts = FACES.map(figureOf);
  const hint = make("p", { class: "se-hint" });
  const reader = make("input", { type: "range", min: 0, max: 100, step: 1, class: "se-reader", "aria-label": phrase("monitor.reader"), title: phrase("monitor.reader_tip") });
  root.append(make("div", { class: "se-head" },
    make("h2", {}, make("span", { class: "se-no", "aria-hidden": "true" }, "4"), phrase("monitor.name")), title,
    make("div", { class: "se-push" }, fields.epochs.parentElement, expand, start, pause, stop)),
    more, make("div", { class: "se-trio" }, ...charts.map((one) => one.figure)), make("div", { class: "se-below" }, hint, reader));

  function field(name, label, help) {
    const input = make("input", { type: "text", inputmode: "decimal", size: 6, placeholder: phrase("monitor.default"), name, title: help });
    input.addEventListener("change", () => model.send({ do: "options", options: typed() }), { signal });
    input.addEventListener("input", update, { signal });
    make("label", { class: "se-field-label", title: help }, label, input);
    return input;
  }
  function typed() {
    return Object.fromEntries(Object.entries(fields).map(([name, input]) => [name, input.value]));
  }

  function figureOf(faces, i) {
    const one = { face: 0, host: make("div", { class: "se-plot" }), cross: make("div", { class: "se-cross", hidden: true }), read: make("div", { class: "se-read", hidden: true }), spot: make("div", { class: "se-spot", hidden: true }), unit: make("span", {}), draw: null };
    const group = make("div", { class: "se-seg se-seg-small", role: "group", "aria-label": phrase("monitor.chart.shows", { number: i + 1 }) });
    faces.forEach(([, name, , help], face) => group.append(button(name, () => { one.face = face; update(); }, signal, { title: help })));
    one.buttons = [...group.children];
    one.stage = make("div", { class: "se-stage" }, one.host, one.cross, one.spot, one.read);
    one.figure = make("figure", { "data-chart": faces[0][0] }, make("figcaption", {}, group, one.unit), one.stage);
    one.stage.addEventListener("pointermove", (event) => pointAt(i, event), { signal });
    one.stage.addEventListener("pointerleave", () => { crossed = null; cross(); }, { signal });
    return one;
  }

  // The schedule: two handles on the chart of the sparsity. What they say stands in the fields, which are the one place where it is kept.

  const handles = [
    handle(phrase("monitor.handle.stabilise"), "begins", (share) => ({ stabilise: limited(share, 0, Math.min(LIMITS.stabilise[1], bounds()[1])), end: bounds()[1] })),
    handle(phrase("monitor.handle.prune"), "ends", (share) => ({ stabilise: bounds()[0], end: limited(share, bounds()[0], 1) })),
  ];
  charts[1].stage.append(...handles.map((one) => one.knob));

  function handle(name, verb, moved) {
    const knob = make("button", { type: "button", role: "slider", class: "se-handle", "data-verb": verb, "aria-label": name, "aria-orientation": "horizontal", "aria-valuemin": 0 }, make("span", { "aria-hidden": "true" }));
    const move = (share) => {
      const { stabilise, end } = moved(share);
      fields.stabilise.value = rounded(stabilise);
      fields.ramp.value = rounded(end - stabilise);
      update();
    };
    const commit = () => model.send({ do: "options", options: typed() });
    const at = () => bounds()[verb === "begins" ? 0 : 1];
    let before = null;
    knob.addEventListener("pointerdown", (event) => {
      if (isFixed() || event.button) return;
      before = typed();
      knob.setPointerCapture(event.pointerId);
      knob.focus();
      event.preventDefault();
    }, { signal });
    knob.addEventListener("pointermove", (event) => { if (before) move(epochAt(1, event) / scene.epochs); }, { signal });
    knob.addEventListener("pointerup", () => { if (before) { before = null; commit(); } }, { signal });
    const cancel = () => {
      if (!before) return;
      for (const key of ["stabilise", "ramp"]) fields[key].value = before[key];
      before = null;
      update();
    };
    knob.addEventListener("pointercancel", cancel, { signal });
    knob.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return cancel();
      const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 }[event.key];
      const to = event.key === "Home" ? 0 : event.key === "End" ? 1 : by === undefined ? null : at() + by * SHARE_STEP;
      if (to === null) return undefined;
      event.preventDefault();
      if (isFixed()) return undefined;
      move(to);
      return commit();
    }, { signal });
    return { knob, at, verb };
  }

  /** Shares of the run at which pruning begins and ends, as the fields say, or as the kernel does where a field cannot be read. */
  function bounds() {
    const [from, ramp] = [number("stabilise"), number("ramp")];
    return from + ramp > 1 + 1e-9 ? [said().stabilise, said().stabilise + said().ramp] : [from, from + ramp];
  }
  function said() {
    return model.get("view").options ?? { epochs: 5, stabilise: 0.1, ramp: 0.4 };
  }
  function number(name) {
    const value = fields[name].value.trim() === "" ? NaN : Number(fields[name].value.replace(",", "."));
    const [low, high] = LIMITS[name];
    return value >= low && value <= high ? value : said()[name];
  }
  const limited = (value, low, high) => Math.min(high, Math.max(low, Math.round(value / SHARE_STEP) * SHARE_STEP));
  const rounded = (value) => String(Number(value.toFixed(3)));
  function isFixed() {
    return Boolean(model.get("view").run?.active) || !model.get("view").shapeable;
  }

  let heard = {};
  /** Write what the kernel has changed into the fields; what is being typed stays. */
  function takeOptions(options) {
    for (const [name, value] of Object.entries(options ?? {})) {
      const isNew = !(name in heard);
      if (!isNew && (heard[name] === value || document.activeElement === fields[name])) continue;
      const typedValue = fields[name].value === "" ? null : Number(fields[name].value.replace(",", "."));
      if (typedValue !== value) fields[name].value = value === null ? "" : String(value);
    }
    heard = { ...options };
  }

  // What is drawn now: `update` works it out, the cross reads it.
  let scene = { epochs: 5 };
  let crossed = null;

  function update() {
    const view = model.get("view");
    const run = view.run ?? null;
    const active = Boolean(run?.active);
    takeOptions(view.options);
    start.hidden = active;
    start.disabled = !view.startable;
    setOne(start, "title", view.why ?? null);
    pause.hidden = stop.hidden = !active;
    pause.dataset.act = view.paused ? "resume" : "pause";
    say(pause, view.paused ? phrase("monitor.resume") : phrase("monitor.pause"));
    stop.disabled = run?.status === "stopping";
    say(stop, run?.status === "stopping" ? phrase("monitor.stopping") : phrase("monitor.stop"));
    for (const [name, input] of Object.entries(fields)) {
      input.disabled = active;
      const usual = view.defaults?.[name];
      setOne(input, "placeholder", usual === undefined ? phrase("monitor.default") : String(usual));
    }
    say(title, view.title ?? "");
    say(hint, view.hint ?? "");

    scene = sceneOf(view, run, active);
    charts.forEach((one, i) => {
      one.buttons.forEach((face, k) => setOne(face, "aria-pressed", String(k === one.face)));
      const [key, name, unit] = FACES[i][one.face];
      setOne(one.figure, "data-chart", key);
      const note = scene.isNext && i === 1 && one.face === 0 ? phrase("monitor.face.sparsity_unit_next") : unit;
      say(one.unit, note);
      setOne(one.unit, "title", note);
      paint(one, PAINTERS[key](scene), name);
    });
    place();
    cross();
  }

  /** Everything that the charts are drawn from, in epochs. */
  function sceneOf(view, run, active) {
    const isNext = Boolean(run) && !active;
    const nextEpochs = number("epochs");
    const [begin, end] = active ? [run.stabilise, run.stabilise + run.ramp] : bounds();
    // A finished run stays while the next one is planned; the axis has room for both.
    const epochs = active ? run.epochs : run ? Math.max(run.epochs, nextEpochs) : nextEpochs;
    const planned = active ? run.epochs : nextEpochs;
    const perEpoch = run?.total_steps ? run.total_steps / run.epochs : 1;
    const toEpochs = (pairs) => pairs.map(([step, ...rest]) => [step / perEpoch, ...rest]);
    const steps = run ? toEpochs(decode(model.get("trace"), 4)) : [];
    const layerSteps = run ? toEpochs(decode(model.get("layer_trace"), 1 + (run.finals?.length ?? 0))) : [];
    const now = run ? run.step / perEpoch : 0;
    const peak = active ? run.peak : (Number(fields.learning_rate.value.replace(",", ".")) || view.options?.learning_rate || view.defaults?.learning_rate) ?? null;
    const [a, b] = [begin * planned, end * planned];
    const due = (at) => {
      const t = b > a ? Math.min(1, Math.max(0, (at - a) / (b - a))) : Number(at >= a);
      return 1 - (1 - t) ** 3;
    };
    // With the two ends of the ramp among them, so that its corners are sharp however steep it is.
    const grid = [...Array.from({ length: 61 }, (_, i) => (i / 60) * planned), a, Math.max(a, b - 1e-9), b].sort((p, q) => p - q);
    return {
      view, run, active, isNext, epochs, planned, steps, layerSteps, now, peak, due, grid, toEpochs,
      begin, end,
      x: { domain: [0, epochs], ticks: ticks(0, epochs, Math.min(6, Math.max(2, Math.ceil(epochs)))).map((v) => [v, String(v)]), label: phrase("monitor.axis") },
      bands: [{ from: 0, to: a, label: phrase("monitor.phase.stabilise") }, { from: a, to: b, label: phrase("monitor.phase.prune"), shade: true }, { from: b, to: planned, label: phrase("monitor.phase.fine_tune") }],
    };
  }

  // One painter a face: what `chart` takes, what the cross reads, and what is said while there is nothing.

  function accuracyChart({ view, run, toEpochs }) {
    const points = toEpochs(run?.evaluations ?? []).map(([at, value]) => [at, 100 * value]);
    const dense = run?.dense_accuracy ?? view.dense_accuracy ?? null;
    const all = points.map(([, v]) => v).concat(dense === null ? [] : [100 * dense]);
    const floor = all.length ? Math.min(...all, Math.max(...all) - 4) : 80;
    const low = Math.max(0, Math.floor((floor - 1) / 2) * 2);
    const high = all.length ? Math.min(100, Math.ceil(Math.max(...all) + 1.2)) : 100;
    return {
      y: [low, high],
      rules: dense === null ? [] : [{ y: 100 * dense, label: phrase("monitor.rule.dense_accuracy", { accuracy: words.percent(dense) }), dash: "5 4", colour: "var(--se-mute)", left: true }],
      lines: [{ points, colour: "var(--se-good)", width: 2.4, dots: 3 }],
      marks: last(points, "var(--se-good)", (v) => `${v.toFixed(1)} %`),
      reads: (at) => told(valueAt(points, at), (v) => `${v.toFixed(1)} %`),
      waiting: all.length ? "" : phrase("monitor.waiting.run"),
    };
  }

  function lossChart({ steps }) {
    const points = steps.map(([at, , loss]) => [at, loss]);
    const smooth = smoothed(points);
    const top = Math.max(0, ...points.map(([, v]) => v)) * 1.1 || 1;
    return {
      y: [0, top],
      lines: [{ points, colour: "var(--se-mute)", width: 1, opacity: 0.45 }, { points: smooth, colour: "var(--se-ink)", width: 2.2 }],
      marks: last(smooth, "var(--se-ink)", words.small),
      reads: (at) => told(valueAt(smooth, at), words.small),
      waiting: points.length ? "" : phrase("monitor.waiting.run"),
    };
  }

  /** The learning rate as a quiet line in percent of its peak: what was, and dashed what will be. */
  function rateLines({ steps, peak, grid, planned, active, now, run }) {
    if (!peak) return [];
    const top = active || !run ? peak : Math.max(peak, ...steps.map(([, , , rate]) => rate));
    const will = grid.filter((at) => !active || at >= now).map((at) => [at, (50 * peak * (1 + Math.cos((Math.PI * at) / planned))) / top]);
    const was = active ? steps.map(([at, , , rate]) => [at, (100 * rate) / top]) : [];
    return [{ points: will, colour: "var(--se-edge)", width: 1.2, dash: "1 4" }, { points: was, colour: "var(--se-edge)", width: 1.2 }];
  }

  function sparsityChart(scene) {
    const { view, run, active, steps, due, grid } = scene;
    const grown = steps.map(([at, sparsity]) => [at, 100 * sparsity]);
    const final = active ? run.asked : (view.plan?.final ?? null);
    const planned = final === null ? [] : grid.map((at) => [at, 100 * final * due(at)]);
    return {
      y: [0, 100],
      lines: [...rateLines(scene), { points: planned, colour: "var(--se-mute)", width: 1.5, dash: "4 4" }, { points: grown, colour: "var(--se-blue)", width: 2.4 }],
      marks: last(grown, "var(--se-blue)", (v) => `${v.toFixed(1)} %`),
      reads: (at) => {
        const rate = rateAt(scene, at);
        const value = valueAt(grown, at);
        const found = value === null ? told(final === null ? null : 100 * final * due(at), (v) => phrase("monitor.read.planned", { sparsity: v.toFixed(1) })) : told(value, (v) => `${v.toFixed(1)} %`);
        if (rate === null) return found;
        const shown = rate.toPrecision(2);
        return { ...found, text: found.text ? phrase("monitor.read.with_rate", { value: found.text, rate: shown }) : phrase("monitor.rate", { rate: shown }) };
      },
      isSchedule: true,
    };
  }

  function layersChart(scene) {
    const { view, run, active, layerSteps, due, grid, now } = scene;
    const chosen = (view.layers ?? []).indexOf(view.selected);
    const finals = active ? run.finals : (view.plan?.finals ?? []);
    const lines = finals.map((final, i) => {
      const strong = i === chosen;
      const measured = hold(layerSteps.map(([at, ...values]) => [at, 100 * (values[i] ?? 0)]), now);
      return {
        name: view.labels?.[i] ?? "", i, strong, measured: measured.length > 0,
        points: measured.length ? measured : grid.map((at) => [at, 100 * final * due(at)]),
        colour: strong ? "var(--se-blue)" : "var(--se-edge)", width: strong ? 2.6 : 1.1, opacity: strong ? 1 : 0.75,
        dash: measured.length ? null : "4 4",
      };
    });
    const strong = lines.find((line) => line.strong);
    return {
      y: [0, 100],
      lines: [...rateLines(scene), ...lines.filter((line) => !line.strong), ...(strong ? [strong] : [])],
      marks: strong?.measured ? last(strong.points, "var(--se-blue)", (v) => `${v.toFixed(1)} %`) : [],
      layers: lines,
      reads: (at, y) => {
        const line = (y === undefined ? strong : nearestLayer(lines, at, y)) ?? strong;
        return line ? told(valueAt(line.points, at), (v) => (line.measured ? phrase("monitor.read.layer", { layer: line.name, sparsity: v.toFixed(1) }) : phrase("monitor.read.layer_planned", { layer: line.name, sparsity: v.toFixed(1) }))) : told(null);
      },
      isSchedule: true,
    };
  }

  function latencyChart({ view, run, toEpochs }) {
    const points = toEpochs(run?.latencies ?? []);
    const dense = run?.dense_ms ?? view.dense_ms ?? null;
    const predicted = run ? run.predicted_ms : (view.predicted_ms ?? null);
    return {
      y: [0, Math.max(0, ...points.map(([, v]) => v), dense ?? 0, predicted ?? 0) * 1.15 || 1],
      rules: [
        ...(dense === null ? [] : [{ y: dense, label: phrase("monitor.rule.dense_latency", { latency: words.ms(dense) }), dash: "5 4", colour: "var(--se-mute)" }]),
        ...(predicted === null ? [] : [{ y: predicted, label: phrase("monitor.rule.predicted_latency", { latency: words.ms(predicted) }), dash: "2 4", colour: "var(--se-mute)", left: true }]),
      ],
      lines: [{ points, colour: "var(--se-accent)", width: 2.4, dots: 3 }],
      marks: last(points, "var(--se-accent)", (v) => `${words.ms(v)} ms`),
      reads: (at) => told(valueAt(points, at), (v) => `${words.ms(v)} ms`),
      waiting: dense === null && predicted === null ? phrase("monitor.waiting.latency") : "",
    };
  }

  function storedChart({ run, toEpochs, now }) {
    const points = hold(toEpochs(run?.stored ?? []).map(([at, bytes]) => [at, bytes / 1000]), now);
    const kB = (v) => `${Math.round(v).toLocaleString("en")} kB`;
    return {
      y: [0, Math.max(0, ...points.map(([, v]) => v)) * 1.15 || 1],
      rules: points.length ? [{ y: points[0][1], label: phrase("monitor.rule.stored", { size: kB(points[0][1]) }), dash: "5 4", colour: "var(--se-mute)" }] : [],
      lines: [{ points, colour: "var(--se-accent)", width: 2.4 }],
      marks: last(points, "var(--se-accent)", kB),
      reads: (at) => told(valueAt(points, at), kB),
      waiting: points.length ? "" : phrase("monitor.waiting.run"),
    };
  }

  const PAINTERS = { accuracy: accuracyChart, loss: lossChart, sparsity: sparsityChart, layers: layersChart, latency: latencyChart, stored: storedChart };

  function paint(one, { y, waiting = "", ...spec }, name) {
    const width = Math.max(240, one.host.clientWidth);
    const now = spec.marks?.[0]?.label;
    const { svg, place: toPixels } = chart({
      ...spec, width, height: HEIGHT, x: scene.x, bands: scene.bands,
      y: { domain: y, ticks: (y[1] === 100 && y[0] === 0 ? [0, 25, 50, 75, 100] : ticks(...y, 4)).map((v) => [v, waiting ? "" : String(v)]) },
      name: now ? phrase("monitor.chart.now", { face: name, value: now }) : phrase("monitor.chart.empty", { face: name }),
    });
    if (waiting) svg.append(draw("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle", class: "se-halo" }, waiting));
    if (spec.isSchedule && scene.peak && width > 300)
      svg.append(draw("text", { x: width - PAD.right - 2, y: RATE_LABEL_Y, "text-anchor": "end", class: "se-halo se-quiet" }, phrase("monitor.rate", { rate: Number(scene.peak.toPrecision(3)) })));
    one.host.replaceChildren(svg);
    Object.assign(one, { toPixels, width, spec });
  }

  /** Put the handles where the schedule has its bounds. */
  function place() {
    const { run, active, planned, view } = scene;
    const fixed = isFixed();
    for (const { knob, at, verb } of handles) {
      const epoch = (active ? (verb === "begins" ? scene.begin : scene.end) : at()) * planned;
      knob.style.left = `${pixel(1, epoch)}px`;
      const epochs = epochWords(epoch);
      const what = verb === "begins" ? phrase("monitor.handle.begins", { epochs }) : phrase("monitor.handle.ends", { epochs });
      const how = !fixed ? phrase("monitor.handle.drag") : run?.active ? phrase("monitor.handle.fixed") : view.why ?? "";
      setAll(knob, {
        "aria-valuemax": Number(planned.toFixed(3)), "aria-valuenow": Number(epoch.toFixed(3)), "aria-valuetext": what, "aria-disabled": fixed ? "true" : null,
        title: phrase("monitor.handle.tip", { what: `${what[0].toUpperCase()}${what.slice(1)}`, how }),
      });
    }
  }

  function pixel(i, epoch) {
    const { toPixels, width, host } = charts[i];
    return (toPixels(epoch, 0)[0] * host.clientWidth) / width;
  }
  function epochAt(i, event) {
    const { host, width } = charts[i];
    const box = host.getBoundingClientRect();
    const px = ((event.clientX - box.left) * width) / (box.width || 1);
    return Math.min(1, Math.max(0, (px - PAD.left) / (width - PAD.left - PAD.right))) * scene.epochs;
  }

  // The cross: all charts are read at the epoch that one of them is pointed at.

  function pointAt(i, event) {
    if (event.pointerType === "touch" && event.buttons === 0) return;
    readAt(i, event);
  }
  function readAt(i, event) {
    const box = charts[i].host.getBoundingClientRect();
    crossed = { at: epochAt(i, event), i, y: event.clientY - box.top };
    cross();
  }
  // A finger is never over a chart before it taps; what it reads then stays until the next touch.
  charts.forEach((one, i) => one.host.addEventListener("click", (event) => readAt(i, event), { signal }));
  root.addEventListener("pointerdown", () => { crossed = null; cross(); }, { signal });
  charts[1].host.addEventListener("click", () => {
    const layers = charts[1].spec.layers;
    const line = layers && crossed ? nearestLayer(layers, crossed.at, crossed.y) : null;
    if (line) model.send({ do: "select", layer: scene.view.layers[line.i] });
  }, { signal });
  reader.addEventListener("input", () => { crossed = { at: (reader.value / 100) * scene.epochs }; cross(); }, { signal });
  reader.addEventListener("focus", () => { crossed = { at: (reader.value / 100) * scene.epochs }; cross(); }, { signal });
  reader.addEventListener("blur", () => { crossed = null; cross(); }, { signal });

  function cross() {
    const heardWords = [];
    charts.forEach((one, i) => {
      const { text, value } = crossed && one.spec ? one.spec.reads(crossed.at, crossed.i === i ? crossed.y : undefined) : told(null);
      one.cross.hidden = !crossed;
      one.spot.hidden = value === null;
      one.read.hidden = !text;
      if (!crossed) return;
      const left = pixel(i, crossed.at);
      one.cross.style.left = `${left}px`;
      if (value !== null) Object.assign(one.spot.style, { left: `${left}px`, top: `${one.toPixels(crossed.at, value)[1]}px` });
      const right = left > one.host.clientWidth / 2;
      Object.assign(one.read.style, { left: `${left}px`, transform: right ? "translateX(calc(-100% - 6px))" : "translateX(6px)" });
      say(one.read, text);
      heardWords.push(phrase("monitor.cross.value", { face: FACES[i][one.face][1], value: text || phrase("monitor.cross.unknown") }));
    });
    if (crossed && crossed.i !== undefined) return;
    const epochs = epochWords(crossed?.at ?? (reader.value / 100) * scene.epochs);
    setOne(reader, "aria-valuetext", heardWords.length ? phrase("monitor.cross.values", { epochs, values: heardWords.join("; ") }) : phrase("monitor.cross.after", { epochs }));
  }

  function nearestLayer(lines, at, y) {
    const away = (line) => {
      const value = valueAt(line.points, at);
      return value === null ? Infinity : Math.abs(charts[1].toPixels(at, value)[1] - y);
    };
    return lines.reduce((best, line) => (best === null || away(line) < away(best) ? line : best), null);
  }

  function rateAt({ steps, peak, planned, active }, at) {
    const was = active ? valueAt(steps.map(([when, , , rate]) => [when, rate]), at) : null;
    return was ?? (peak && at <= planned ? (peak * (1 + Math.cos((Math.PI * at) / planned))) / 2 : null);
  }

  function told(value, wording) {
    return value === null || value === undefined ? { text: "", value: null } : { text: wording(value), value };
  }

  function last(points, colour, label) {
    const end = points.at(-1);
    return end ? [{ x: end[0], y: end[1], colour, label: label(end[1]) }] : [];
  }

  for (const one of charts) onResize(one.host, update, signal);
  follow(model, ["view", "trace", "layer_trace"], update, signal);
}

function epochWords(epoch) {
  const rounded = Number(epoch.toFixed(2));
  return phrase("common.epochs", { count: rounded, epochs: rounded });
}

/** The line through `points` at `at`; null outside of it. */
function valueAt(points, at) {
  if (!points.length || at < points[0][0] - 1e-9 || at > points.at(-1)[0] + 1e-9) return null;
  for (let i = 1; i < points.length; i++) {
    const [[x0, y0], [x1, y1]] = [points[i - 1], points[i]];
    if (at <= x1) return x1 > x0 ? y0 + ((y1 - y0) * (at - x0)) / (x1 - x0) : y1;
  }
  return points.at(-1)[1];
}

/** Masks hold until they are chosen anew: steps instead of slopes, the last one up to `now`. */
function hold(points, now) {
  const held = points.flatMap(([at, value], i) => (i ? [[at, points[i - 1][1]], [at, value]] : [[at, value]]));
  return held.length && now > held.at(-1)[0] ? [...held, [now, held.at(-1)[1]]] : held;
}

/** A running mean whose memory is a twentieth of the points. */
function smoothed(points) {
  const keep = 1 - 1 / Math.max(1, Math.min(12, points.length / 20));
  let sum = 0;
  let weight = 0;
  return points.map(([at, value]) => {
    sum = keep * sum + value;
    weight = keep * weight + 1;
    return [at, sum / weight];
  });
}

/** Rows of `width` float32 numbers. */
function decode(data, width) {
  if (!data?.byteLength) return [];
  const flat = new Float32Array(data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength));
  return Array.from({ length: Math.floor(flat.length / width) }, (_, i) => [...flat.subarray(i * width, (i + 1) * width)]);
}

export default { render };
