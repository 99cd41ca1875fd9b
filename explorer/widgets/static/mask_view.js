// Which weights of a layer are alive: a picture of its mask, and a slider over the moments of a run.

const BOX = 290; // pixels, the height that a picture may take
const LONGEST = 6; // times as long as it is thin: more than that, and a cell is a bar
const AHEAD = 4; // bytes in front of the cells: rows and columns

function render({ model, el, signal }) {
  const root = section(el, phrase("mask.name"), "se-card se-mask");
  const canvas = make("canvas", { role: "img" });
  const tip = make("div", { class: "se-tip", hidden: true });
  const waiting = make("p", { class: "se-hint" });
  const plot = make("div", { class: "se-mask-plot" }, canvas, waiting, tip);
  const layer = make("select", { title: phrase("mask.layer_tip") });
  const bars = button(phrase("mask.bars"), () => set("source", "bars"), signal, { title: phrase("mask.bars_tip") });
  const run = button(phrase("mask.run"), () => set("source", "run"), signal, { title: phrase("mask.run_tip") });
  const time = make("input", { type: "range", min: 0, max: 0, step: 1, "aria-label": phrase("mask.moment"), title: phrase("mask.moment_tip") });
  const told = make("output", { "aria-live": "off" });
  const text = make("p", { class: "se-mask-text" });
  const caption = make("p", { class: "se-hint se-mask-caption" });
  root.append(
    make("div", { class: "se-head" }, make("h2", {}, phrase("mask.name")), make("small", {}, phrase("mask.about")),
      make("div", { class: "se-push" }, make("div", { class: "se-seg", role: "group", "aria-label": phrase("mask.source") }, bars, run))),
    make("div", { class: "se-mask-body" },
      make("figure", {}, plot),
      make("div", { class: "se-mask-side" },
        make("label", {}, phrase("mask.layer"), layer),
        make("div", { class: "se-mask-time" }, make("label", {}, phrase("mask.moment")), time, told),
        text, caption,
        make("p", { class: "se-hint se-mask-key" }, make("span", { class: "se-mask-ramp", "aria-hidden": "true" }), phrase("mask.key")))));

  function set(name, value) {
    model.set(name, value);
    model.save_changes();
  }
  layer.addEventListener("change", () => model.send({ do: "select", layer: model.get("view").layers[layer.selectedIndex] }), { signal });
  time.addEventListener("input", () => {
    const { steps, times } = model.get("view");
    const at = Number(time.value);
    tell(times[at]);
    // The right end is "the latest" and goes on with the run.
    set("moment", at === steps.length - 1 ? -1 : steps[at]);
  }, { signal });

  let picture = null;
  plot.addEventListener("pointerleave", () => { tip.hidden = true; }, { signal });
  root.addEventListener("pointerdown", () => { tip.hidden = true; }, { signal });
  for (const kind of ["pointermove", "click"]) canvas.addEventListener(kind, point, { signal }); // a finger only taps
  const themes = new MutationObserver(paint);
  themes.observe(document.documentElement, { attributeFilter: ["data-se-theme"] });
  signal.addEventListener("abort", () => themes.disconnect());
  onWidth(plot, paint);
  follow(model, ["view", "picture"], update, signal);

  function tell(epoch) {
    const epochs = epoch === undefined ? "" : phrase("common.epochs", { count: epoch, epochs: epoch });
    say(told, epochs);
    setOne(time, "aria-valuetext", epochs ? phrase("mask.moment_after", { epochs }) : null);
  }

  function update() {
    const view = model.get("view");
    const labels = view.labels ?? [];
    if (layer.childElementCount !== labels.length || [...layer.options].some((option, i) => option.textContent !== labels[i]))
      layer.replaceChildren(...labels.map((label) => make("option", {}, label)));
    layer.selectedIndex = (view.layers ?? []).indexOf(view.selected);
    layer.disabled = !labels.length;
    setOne(bars, "aria-pressed", String(view.source === "bars"));
    setOne(run, "aria-pressed", String(view.source === "run"));
    say(run, view.run ? phrase("mask.run_number", { number: view.run }) : phrase("mask.run"));
    run.disabled = !view.run;
    const times = view.source === "run" ? view.times : [];
    time.disabled = times.length < 2;
    setOne(time, "max", Math.max(0, times.length - 1));
    if (document.activeElement !== time || !time.matches(":active")) time.value = String(Math.max(0, view.at));
    tell(times[view.at]);
    picture = decode(model.get("picture"));
    canvas.hidden = !picture;
    waiting.hidden = Boolean(picture);
    say(waiting, picture ? "" : view.text ?? "");
    say(text, picture ? view.text : "");
    say(caption, view.caption ?? "");
    setOne(canvas, "aria-label", view.text);
    tip.hidden = true;
    paint();
  }

  /** Rows and columns as uint16, then the cells. */
  function decode(data) {
    if (!data?.byteLength) return null;
    const [rows, columns] = [data.getUint16(0, true), data.getUint16(2, true)];
    return { rows, columns, cells: new Uint8Array(data.buffer, data.byteOffset + AHEAD, rows * columns) };
  }

  function paint() {
    // Out of the document there are no colours; coming into it has a width and so a call of its own.
    if (!picture || !root.isConnected) return;
    const { rows, columns, cells } = picture;
    // Cells of whole pixels: with others some would be wider, and draw stripes that are not in the mask.
    const room = Math.max(120, plot.clientWidth - 12);
    const [across, down] = [Math.max(1, Math.floor(room / columns)), Math.max(1, Math.floor(BOX / rows))];
    const [cellWidth, cellHeight] = [Math.min(across, LONGEST * down), Math.min(down, LONGEST * across)];
    const wide = Math.min(room, columns * cellWidth);
    setOne(canvas, "width", columns);
    setOne(canvas, "height", rows);
    Object.assign(canvas.style, { width: `${wide}px`, height: `${rows * cellHeight}px` });
    const [red, green, blue] = ink();
    const image = new ImageData(columns, rows);
    // The root lifts the few weights of a sparse layer out of the ground; the key has the same ramp.
    for (let i = 0; i < cells.length; i++) image.data.set([red, green, blue, Math.sqrt(255 * cells[i])], 4 * i);
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  /** The accent colour of the theme as numbers: a canvas knows no variables. */
  function ink() {
    const probe = make("span", { style: "color:var(--se-accent)", hidden: true });
    root.append(probe);
    const found = getComputedStyle(probe).color.match(/\d+/g).slice(0, 3).map(Number);
    probe.remove();
    return found;
  }

  function point(event) {
    const cell = model.get("view").cell;
    if (!picture || !cell) return;
    const box = canvas.getBoundingClientRect();
    const at = (place, length, count) => Math.min(count - 1, Math.max(0, Math.floor((place / length) * count)));
    const row = at(event.clientY - box.top, box.height, picture.rows);
    const column = at(event.clientX - box.left, box.width, picture.columns);
    const first = column * cell.columns;
    const last = Math.min(cell.weights, first + cell.columns) - 1;
    const outputs = outputsOf(row * cell.rows, Math.min(cell.outputs, (row + 1) * cell.rows) - 1);
    const inputs = inputsOf(Math.floor(first / cell.kernel), Math.floor(last / cell.kernel));
    const alive = picture.cells[row * picture.columns + column] / 255;
    tip.replaceChildren(
      make("b", {}, cell.grouped ? phrase("mask.cell.place_in_group", { outputs, inputs }) : phrase("mask.cell.place", { outputs, inputs })),
      cell.rows * cell.columns > 1 ? phrase("mask.cell.alive_share", { share: (100 * alive).toFixed(0) }) : alive ? phrase("mask.cell.alive") : phrase("mask.cell.zero"));
    tip.hidden = false;
    const outer = plot.getBoundingClientRect();
    const [x, y] = [event.clientX - outer.left, event.clientY - outer.top];
    Object.assign(tip.style, { left: `${x}px`, top: `${y}px`, transform: `translate(${x > outer.width / 2 ? "calc(-100% - 12px)" : "12px"}, ${y > outer.height / 2 ? "calc(-100% - 6px)" : "6px"})` });
  }

  function outputsOf(first, last) {
    return first === last ? phrase("mask.cell.output", { number: first }) : phrase("mask.cell.outputs", { first, last });
  }

  function inputsOf(first, last) {
    return first === last ? phrase("mask.cell.input", { number: first }) : phrase("mask.cell.inputs", { first, last });
  }

  function onWidth(host, redraw) {
    const observer = new ResizeObserver(redraw);
    observer.observe(host);
    signal.addEventListener("abort", () => observer.disconnect());
  }
}

export default { render };
