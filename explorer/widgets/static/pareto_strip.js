// The least harm at each speed: a curve to click, and a slider that walks along it.

const HEIGHT = 184;
const FLOOR = 1e-3; // nats; the axis is logarithmic

function render({ model, el, signal }) {
  const root = section(el, phrase("balance.name"), "se-card se-pareto", 3);
  const range = make("input", { type: "range", min: 0, max: 1, step: 1, "aria-label": phrase("balance.slider") });
  const told = make("output", { class: "se-mute", "aria-live": "off" }); // its slider says it
  const balance = make("span", { class: "se-balance" }, make("span", { class: "se-mute" }, phrase("balance.less_harm")), range, make("span", { class: "se-mute" }, phrase("balance.more_speed")), told);
  const host = make("div", { class: "se-plot", title: phrase("balance.adopt_tip") });
  const tip = make("div", { class: "se-tip", hidden: true });
  const plot = make("div", { class: "se-strip" }, host, tip);
  const empty = make("p", { class: "se-empty" });
  root.append(make("div", { class: "se-head" }, make("h2", {}, phrase("balance.name")), make("small", {}, phrase("balance.about")), make("div", { class: "se-push" }, balance)), plot, empty);

  let place = null;
  let width = 0;

  const points = () => model.get("points") ?? [];
  const adopt = (index) => { if (!model.get("view").busy && points().length) model.send({ do: "adopt", index }); };
  range.addEventListener("input", () => describe(Number(range.value)), { signal });
  range.addEventListener("change", () => adopt(Number(range.value)), { signal });
  host.addEventListener("click", (event) => { const index = nearest(event); if (index !== null) adopt(index); }, { signal });
  host.addEventListener("pointerleave", () => { tip.hidden = true; }, { signal });
  host.addEventListener("pointermove", (event) => {
    const index = nearest(event);
    tip.hidden = index === null;
    if (index === null) return;
    const [speedup, harm] = points()[index];
    const [x, y] = place(speedup, Math.max(harm, FLOOR));
    const scale = host.clientWidth / width;
    tip.replaceChildren(make("b", {}, `${speedup.toFixed(2)} ×`), phrase("balance.point_tip", { kind: model.get("view").harm, harm: words.small(harm) }));
    Object.assign(tip.style, { left: `${x * scale}px`, top: `${y}px`, transform: x > width / 2 ? "translate(calc(-100% - 12px), -50%)" : "translate(12px, -50%)" });
  }, { signal });

  let preview = null; // where the bars that are being dragged would be
  hearPage(model, "preview", (told) => { preview = told && told.speedup && told.harm !== undefined ? [told.speedup, told.harm] : null; update(); }, signal);
  onResize(host, update, signal);
  follow(model, ["view", "points"], update, signal);

  function nearest(event) {
    const all = points();
    if (!place || !all.length) return null;
    const box = host.getBoundingClientRect();
    const px = ((event.clientX - box.left) * width) / box.width;
    const distance = ([speedup]) => Math.abs(place(speedup, 1)[0] - px);
    return all.reduce((best, point, i) => (distance(point) < distance(all[best]) ? i : best), 0);
  }

  function describe(index) {
    const point = points()[index];
    if (!point) return;
    say(told, phrase("balance.place", { speedup: point[0].toFixed(2), harm: words.small(point[1]) }));
    setOne(range, "aria-valuetext", phrase("balance.place_spoken", { speedup: point[0].toFixed(2), kind: model.get("view").harm, harm: words.small(point[1]) }));
  }

  function update() {
    const view = model.get("view");
    const all = points();
    const any = all.length > 1;
    plot.hidden = !any;
    balance.style.visibility = any ? "visible" : "hidden"; // its place is kept
    empty.hidden = any;
    say(empty, view.measured ? phrase("balance.working") : phrase("balance.waiting"));
    if (!any) return;
    range.disabled = Boolean(view.busy);
    setOne(range, "max", all.length - 1);
    const here = view.here && (preview ?? view.here);
    if (here && document.activeElement !== range) {
      const at = all.reduce((best, point, i) => (Math.abs(Math.log(point[0] / here[0])) < Math.abs(Math.log(all[best][0] / here[0])) ? i : best), 0);
      range.value = String(at);
      describe(at);
    }
    width = Math.max(240, host.clientWidth);
    const [low, high] = [all[0][0], all[all.length - 1][0]];
    const shown = (harm) => Math.max(harm, FLOOR);
    const top = Math.max(1, ...all.map((point) => point[1]), here?.[1] ?? 0) * 1.3;
    const decades = [1e-3, 0.01, 0.1, 1, 10].filter((value) => value <= top);
    const drawn = chart({
      width,
      height: HEIGHT,
      pad: { top: 28, left: 58 },
      x: { domain: [low, high], ticks: [1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30].filter((value) => value >= low - 0.01 && value <= high * 1.001).map((value) => [value, `${value} ×`]), label: phrase("balance.axis"), map: Math.log },
      y: { domain: [FLOOR, top], ticks: decades.map((value) => [value, value === FLOOR ? "≤ 0.001" : String(value)]), label: phrase("balance.axis_harm", { kind: view.harm }), map: Math.log10 },
      lines: [{ points: all.map(([speedup, harm]) => [speedup, shown(harm)]), colour: "var(--se-accent)", width: 2.4 }],
      marks: here ? [{ x: Math.min(high, Math.max(low, here[0])), y: shown(here[1]), colour: "var(--se-ink)", r: 6, label: phrase("balance.here"), left: true }] : [],
      name: phrase("balance.chart", { kind: view.harm }),
    });
    place = drawn.place;
    host.replaceChildren(drawn.svg);
  }
}

export default { render };
