// What came out, beside what went in; the file to keep; and the log.

function render({ model, el, signal }) {
  const root = section(el, phrase("result.name"), "se-card se-result", 5);
  const title = make("small", {});
  const download = button(phrase("result.download"), () => model.send({ do: "pack" }), signal, { class: "se-primary", title: phrase("result.download_tip") });
  const body = make("tbody");
  const headRow = make("tr");
  const table = make("table", {}, make("caption", { class: "se-hidden" }, phrase("result.caption")), make("thead", {}, headRow), body);
  const empty = make("div", { class: "se-empty" }, make("b", {}, phrase("result.empty")), make("p", {}, phrase("result.empty_help")));
  const note = make("p", { class: "se-hint" });
  const layersBody = make("tbody");
  const layers = make("div", {}, make("h3", {}, phrase("result.each_layer")),
    make("div", { class: "se-scroll", tabindex: 0, role: "group", "aria-label": phrase("result.layers_scrollable") }, make("table", {}, make("caption", { class: "se-hidden" }, phrase("result.layers")), make("thead", {}, make("tr", {}, ...[phrase("result.column.layer"), phrase("result.column.asked"), phrase("result.column.achieved"), phrase("result.column.zeros")].map((name, i) => make("th", { scope: "col", class: i ? "se-num" : null }, name)))), layersBody)));
  const files = filesRow(model, signal);
  const lines = make("pre", { tabindex: 0, role: "log", "aria-live": "off", "aria-label": phrase("result.log") });
  const log = make("details", { class: "se-log" }, make("summary", {}, phrase("result.log")), lines);
  root.append(make("div", { class: "se-head" }, make("h2", {}, make("span", { class: "se-no", "aria-hidden": "true" }, "5"), phrase("result.name")), title, make("div", { class: "se-push" }, download)), files.element, empty, make("div", { class: "se-two" }, make("div", {}, table, note), layers), log);

  follow(model, ["view"], () => {
    const view = model.get("view");
    const rows = view.rows ?? [];
    files.update(view);
    empty.hidden = Boolean(rows.length);
    table.parentElement.parentElement.hidden = !rows.length;
    say(note, view.note ?? "");
    download.disabled = !view.downloadable;
    say(download, view.packing ? phrase("result.packing") : phrase("result.download"));
    say(title, view.title ?? "");
    headRow.replaceChildren(...(view.columns ?? []).map((name, i) => make("th", { scope: "col", class: i ? "se-num" : null }, name)));
    body.replaceChildren(...rows.map(([name, ...cells]) => make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", { class: "se-num" }, cell)))));
    layersBody.replaceChildren(...(view.layers ?? []).map(([name, ...cells]) => make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", { class: "se-num" }, cell)))));
  }, signal);
  follow(model, ["log"], () => {
    say(lines, (model.get("log") ?? []).join("\n"));
    lines.scrollTop = lines.scrollHeight;
  }, signal);

  // A file arrives as bytes, is handed to the browser, and the kernel may forget it.
  const take = () => {
    const { number, filename } = model.get("file");
    const content = model.get("content");
    if (!number || !content?.byteLength) return;
    const url = URL.createObjectURL(new Blob([content]));
    const link = make("a", { href: url, download: filename, hidden: true });
    root.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    model.send({ do: "taken" });
  };
  model.on("change:content", take);
  signal.addEventListener("abort", () => model.off("change:content", take));
}

export default { render };
