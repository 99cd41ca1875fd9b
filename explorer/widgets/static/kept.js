// Distributions that are kept by name: take one back, or draw it behind the bars.

/** Make the row. Returns its element and `update(view)`. */
function keptRow(gesture, signal) {
  const name = make("input", { type: "text", size: 14, maxlength: 40, placeholder: "name (optional)", "aria-label": "Name to keep this distribution by" });
  const keep = button("Keep", () => { gesture("keep", { name: name.value }); name.value = ""; }, signal, { title: "Keep this distribution by name, to come back to it or to compare with it" });
  name.addEventListener("keydown", (event) => { if (event.key === "Enter") keep.click(); }, { signal });
  const chips = make("div", { class: "se-chips", role: "group", "aria-label": "Kept distributions" });
  const element = make("div", { class: "se-kept" }, name, keep, chips);
  let drawn = null;

  function chip({ name: label, here }, compared) {
    const part = (text, what, props) => button(text, () => gesture(what, { name: label === compared && what === "compare" ? "" : label }), signal, props);
    return make("span", { class: "se-chip", "data-here": here ? "yes" : null },
      part(label, "take", { class: "se-plain", title: here ? "This is what the bars show" : "Put it on the page; Undo brings the present one back", "aria-label": `Take ${label}` }),
      part("behind", "compare", { class: "se-plain", "aria-pressed": String(label === compared), title: "Draw it as a line behind the bars", "aria-label": `Compare with ${label}` }),
      part("×", "forget", { class: "se-plain", title: "Forget it", "aria-label": `Forget ${label}` }));
  }

  function update(view) {
    const key = JSON.stringify([view.snapshots, view.compared]);
    if (key === drawn) return;
    drawn = key;
    const focused = [...chips.querySelectorAll("button")].indexOf(document.activeElement);
    chips.replaceChildren(...(view.snapshots ?? []).map((one) => chip(one, view.compared)));
    if (focused >= 0) [...chips.querySelectorAll("button")].at(Math.min(focused, chips.querySelectorAll("button").length - 1))?.focus();
  }
  return { element, update };
}
