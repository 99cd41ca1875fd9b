// One pruning run, live: accuracy, sparsity and measured latency over the same epochs, and the settings before it starts.

const HEIGHT = 214;
const MORE = [
  ["learning_rate", "Peak learning rate", "default"],
  ["stabilise", "Stabilise (share)", "0.1"],
  ["ramp", "Prune (share)", "0.4"],
  ["update_every", "Steps per mask update", "default"],
  ["seed", "Seed", "0"],
];

function render({ model, el, signal }) {
  const root = section(el, "Prune", "se-card se-run", 4);
  const title = make("small", {});
  const fields = { epochs: field("epochs", "Epochs", "5") };
  const more = make("div", { class: "se-more", id: `se-more-${Math.random().toString(36).slice(2)}`, hidden: true });
  for (const [name, label, hint] of MORE) {
    fields[name] = field(name, label, hint);
    more.append(fields[name].parentElement);
  }
  const expand = button("Settings", () => {
    more.hidden = !more.hidden;
    setOne(expand, "aria-expanded", String(!more.hidden));
  }, signal, { "aria-expanded": "false", "aria-controls": more.id });
  const start = button("Start pruning", () => {
    options();
    model.send({ do: "start" });
  }, signal, { class: "se-primary" });
  const pause = button("Pause", () => model.send({ do: pause.dataset.act }), signal);
  const stop = button("Stop", () => model.send({ do: "stop" }), signal);
  const charts = ["accuracy", "sparsity", "latency"].map((what) => make("figure", { "data-chart": what }, make("figcaption"), make("div", { class: "se-plot" })));
  const hint = make("p", { class: "se-hint" });
  root.append(make("div", { class: "se-head" },
    make("h2", {}, make("span", { class: "se-no", "aria-hidden": "true" }, "4"), "Prune"), title,
    make("div", { class: "se-push" }, fields.epochs.parentElement, expand, start, pause, stop)),
    more, make("div", { class: "se-trio" }, ...charts), hint);

  function field(name, label, hintText) {
    const input = make("input", { type: "text", inputmode: "decimal", size: 6, placeholder: hintText, name });
    input.addEventListener("change", options, { signal });
    make("label", { class: "se-field-label" }, label, input);
    return input;
  }
  function options() {
    model.send({ do: "options", options: Object.fromEntries(Object.entries(fields).map(([name, input]) => [name, input.value])) });
  }

  for (const figure of charts) onResize(figure.lastElementChild, update, signal);
  follow(model, ["view", "trace"], update, signal);

  function update() {
    const view = model.get("view");
    const run = view.run ?? null;
    const active = Boolean(run?.active);
    start.hidden = active;
    start.disabled = !view.startable;
    setOne(start, "title", view.why ?? null);
    pause.hidden = stop.hidden = !active;
    pause.dataset.act = view.paused ? "resume" : "pause";
    say(pause, view.paused ? "Resume" : "Pause");
    stop.disabled = run?.status === "stopping";
    say(stop, run?.status === "stopping" ? "Stopping" : "Stop");
    for (const input of Object.values(fields)) input.disabled = active;
    if (!fields.epochs.value && document.activeElement !== fields.epochs) fields.epochs.value = String(view.options?.epochs ?? 5);
    say(title, view.title ?? "");
    say(hint, view.hint ?? "");

    const trace = decode(model.get("trace"));
    const epochs = run ? run.epochs : (view.options?.epochs ?? 5);
    const perEpoch = run && run.total_steps ? run.total_steps / run.epochs : 1;
    const toEpoch = (step) => step / perEpoch;
    const x = { domain: [0, epochs], ticks: ticks(0, epochs, Math.min(6, Math.max(2, Math.ceil(epochs)))).map((v) => [v, String(v)]), label: "epochs of training" };
    const plan = view.plan ?? { stabilise: 0.1, ramp: 0.4, final: null };
    const [a, b] = [plan.stabilise * epochs, (plan.stabilise + plan.ramp) * epochs];
    const bands = [{ from: 0, to: a, label: "stabilise" }, { from: a, to: b, label: "prune", shade: true }, { from: b, to: epochs, label: "fine-tune" }];
    const shared = { x, bands, height: HEIGHT };

    // Accuracy
    const accuracy = (run?.evaluations ?? []).map(([step, value]) => [toEpoch(step), 100 * value]);
    const dense = run?.dense_accuracy ?? view.dense_accuracy ?? null;
    const all = accuracy.map(([, v]) => v).concat(dense === null ? [] : [100 * dense]);
    const floor = all.length ? Math.min(...all, Math.max(...all) - 4) : 80;
    const low = Math.max(0, Math.floor((floor - 1) / 2) * 2);
    const high = all.length ? Math.min(100, Math.ceil(Math.max(...all) + 1.2)) : 100;
    paint(0, {
      ...shared,
      y: { domain: [low, high], ticks: ticks(low, high, 4).map((v) => [v, String(v)]) },
      rules: dense === null ? [] : [{ y: 100 * dense, label: `dense ${words.percent(dense)}`, dash: "5 4", colour: "var(--se-mute)", left: true }],
      lines: [{ points: accuracy, colour: "var(--se-good)", width: 2.4, dots: 3 }],
      marks: last(accuracy, "var(--se-good)", (v) => `${v.toFixed(1)} %`),
    }, "Accuracy", "% of validation images", all.length ? "" : "starts with the run");

    // Sparsity
    const grown = trace.map(([step, sparsity]) => [toEpoch(step), 100 * sparsity]);
    const final = run ? run.asked : plan.final;
    const planned = final === null ? [] : Array.from({ length: 61 }, (_, i) => {
      const at = (i / 60) * epochs;
      const t = b > a ? Math.min(1, Math.max(0, (at - a) / (b - a))) : Number(at >= a);
      return [at, 100 * final * (1 - (1 - t) ** 3)];
    });
    paint(1, {
      ...shared,
      y: { domain: [0, 100], ticks: [0, 25, 50, 75, 100].map((v) => [v, String(v)]) },
      lines: [{ points: planned, colour: "var(--se-mute)", width: 1.5, dash: "4 4" }, { points: grown, colour: "var(--se-blue)", width: 2.4 }],
      marks: last(grown, "var(--se-blue)", (v) => `${v.toFixed(1)} %`),
    }, "Sparsity", "% of all prunable weights; dashed: the schedule");

    // Latency
    const times = (run?.latencies ?? []).map(([step, ms]) => [toEpoch(step), ms]);
    const denseMs = run?.dense_ms ?? view.dense_ms ?? null;
    const predicted = run ? run.predicted_ms : (view.predicted_ms ?? null);
    const top = Math.max(0, ...times.map(([, v]) => v), denseMs ?? 0, predicted ?? 0) * 1.15 || 1;
    paint(2, {
      ...shared,
      y: { domain: [0, top], ticks: ticks(0, top, 4).map((v) => [v, String(v)]) },
      rules: [
        ...(denseMs === null ? [] : [{ y: denseMs, label: `dense ${words.ms(denseMs)} ms`, dash: "5 4", colour: "var(--se-mute)" }]),
        ...(predicted === null ? [] : [{ y: predicted, label: `predicted ${words.ms(predicted)} ms`, dash: "2 4", colour: "var(--se-mute)", left: true }]),
      ],
      lines: [{ points: times, colour: "var(--se-accent)", width: 2.4, dots: 3 }],
      marks: last(times, "var(--se-accent)", (v) => `${words.ms(v)} ms`),
    }, "Latency", "ms, measured on the sparse engine", denseMs === null && predicted === null ? "measured during the run" : "");
  }

  function paint(i, spec, name, unit, waiting = "") {
    const figure = charts[i];
    const host = figure.lastElementChild;
    const width = Math.max(240, host.clientWidth);
    const now = spec.marks?.[0]?.label;
    const { svg } = chart({ ...spec, width, name: `${name} over the epochs${now ? `, now ${now}` : ", no values yet"}` });
    if (waiting) svg.append(draw("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, waiting));
    host.replaceChildren(svg);
    figure.firstElementChild.replaceChildren(make("b", {}, name), " ", make("span", {}, unit));
  }

  function last(points, colour, label) {
    const end = points.at(-1);
    return end ? [{ x: end[0], y: end[1], colour, label: label(end[1]) }] : [];
  }

  /** Steps come as float32 triples (step, sparsity, loss): a run is a few kilobytes. */
  function decode(data) {
    if (!data?.byteLength) return [];
    const flat = new Float32Array(data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength));
    return Array.from({ length: flat.length / 3 }, (_, i) => [flat[3 * i], flat[3 * i + 1], flat[3 * i + 2]]);
  }
}

export default { render };
