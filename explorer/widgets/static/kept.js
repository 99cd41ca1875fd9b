// Distributions that are kept by name: take one back, or draw it behind the bars.

/** Make the row. Returns its element and `update(view)`. */
function keptRow(gesture, signal) {
  const name = make("input", { type: "text", size: 17, maxlength: 40, placeholder: phrase("kept.placeholder"), "aria-label": phrase("kept.name") });
  const keep = button(phrase("kept.keep"), () => { gesture("keep", { name: name.value }); name.value = ""; }, signal, { title: phrase("kept.keep_tip") });
  name.addEventListener("keydown", (event) => { if (event.key === "Enter") keep.click(); }, { signal });
  const chips = make("div", { class: "se-chips", role: "group", "aria-label": phrase("kept.all") });
  const element = make("div", { class: "se-kept" }, name, keep, chips);
  let drawn = null;

  function chip({ name: label, here }, compared) {
    const part = (text, what, props) => button(text, () => gesture(what, { name: label === compared && what === "compare" ? "" : label }), signal, props);
    return make("span", { class: "se-chip", "data-here": here ? "yes" : null },
      part(label, "take", { class: "se-plain", title: here ? phrase("kept.here_tip") : phrase("kept.take_tip"), "aria-label": phrase("kept.take", { name: label }) }),
      part(phrase("kept.behind"), "compare", { class: "se-plain", "aria-pressed": String(label === compared), title: phrase("kept.behind_tip"), "aria-label": phrase("kept.compare", { name: label }) }),
      part("×", "forget", { class: "se-plain", title: phrase("kept.forget_tip"), "aria-label": phrase("kept.forget", { name: label }) }));
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
