// What the model is made of: one row a layer, with the figures that decide whether pruning it pays.

const COLUMNS = [
  [phrase("layers.column.layer"), phrase("layers.column.layer_tip"), "text"],
  [phrase("layers.column.shape"), phrase("layers.column.shape_tip"), "shape"],
  [phrase("layers.column.weights"), phrase("layers.column.weights_tip"), "number"],
  [phrase("layers.column.macs"), phrase("layers.column.macs_tip"), "number"],
  [phrase("layers.column.dense"), phrase("layers.column.dense_tip"), "number"],
  [phrase("layers.column.share"), phrase("layers.column.share_tip"), "number"],
];

function render({ model, el, signal }) {
  const root = section(el, phrase("layers.name"), "se-card se-layers", 1);
  const title = make("h2", {}, make("span", { class: "se-no", "aria-hidden": "true" }, "1"), phrase("layers.name"));
  const note = make("small", {});
  const head = make("tr", {}, ...COLUMNS.map(([name, help, kind]) => make("th", { scope: "col", title: help, class: { number: "se-num", shape: "se-shape" }[kind] ?? null }, name)));
  const body = make("tbody");
  const empty = make("div", { class: "se-empty" }, make("b", {}, phrase("layers.loading")), make("p", {}, phrase("layers.loading_help")));
  const scroll = make("div", { class: "se-scroll", tabindex: 0, role: "group", "aria-label": phrase("layers.scrollable") }, make("table", {}, make("caption", { class: "se-hidden" }, phrase("layers.caption")), make("thead", {}, head), body));
  root.append(make("div", { class: "se-head" }, title, note), scroll, empty);
  let drawn = null;
  hearPage(model, "point", (name) => { for (const line of body.children) setOne(line, "data-pointed", line.dataset.layer === name ? "yes" : null); }, signal);
  body.addEventListener("pointerover", (event) => tellPage(model, "point", event.target.closest("tr")?.dataset.layer ?? null), { signal });
  body.addEventListener("pointerleave", () => tellPage(model, "point", null), { signal });

  follow(model, ["view"], () => {
    const view = model.get("view");
    const rows = view.rows ?? [];
    scroll.hidden = !rows.length;
    empty.hidden = Boolean(rows.length);
    say(note, view.note ?? "");
    const key = JSON.stringify(rows);
    if (key !== drawn) {
      drawn = key;
      body.replaceChildren(...rows.map(row));
    }
    [...body.children].forEach((line) => {
      const now = line.dataset.layer === view.selected;
      setOne(line, "class", now ? "se-selected" : null);
      setOne(line.querySelector("button"), "aria-pressed", String(now));
    });
  }, signal);

  function row(layer) {
    const choose = button(layer.label, () => model.send({ do: "select", layer: layer.name }), signal, { class: "se-name", title: layer.label });
    const share = make("td", { class: "se-num se-share" }, make("span", {}, layer.share === null ? "–" : words.percent(layer.share, layer.share < 0.1 ? 1 : 0)));
    if (layer.share !== null) share.prepend(make("i", { style: `width:${(26 * layer.share) / layer.max_share}px`, "aria-hidden": "true" }));
    return make("tr", { "data-layer": layer.name },
      make("th", { scope: "row" }, choose),
      make("td", { class: "se-shape" }, layer.shape),
      make("td", { class: "se-num" }, words.count(layer.n_params)),
      make("td", { class: "se-num" }, words.count(layer.macs)),
      make("td", { class: "se-num" }, layer.dense_ms === null ? "–" : words.ms(layer.dense_ms)),
      share);
  }
}

export default { render };
