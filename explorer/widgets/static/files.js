// Files of what there is now, to take along, and a recipe to bring back.

const SAVES = [
  ["recipe", phrase("files.recipe"), phrase("files.recipe_tip")],
  ["measurements", phrase("files.measurements"), phrase("files.measurements_tip")],
  ["report", phrase("files.report"), phrase("files.report_tip")],
];

function bytes(size) {
  const [value, unit] = size >= 1e5 ? [size / 1048576, "MB"] : [size / 1024, "kB"];
  return `${value.toFixed(1).replace(/\.0$/, "")} ${unit}`;
}

/** Make the row. Returns its element and `update(view)`. */
function filesRow(model, signal) {
  const saves = SAVES.map(([what, label, help]) => [what, help, button(label, () => model.send({ do: "save", what }), signal)]);
  const input = make("input", { type: "file", accept: ".yaml,.yml,.json,application/yaml,application/json", hidden: true, "aria-label": phrase("files.recipe_file") });
  const load = button(phrase("files.load"), () => input.click(), signal);
  const limit = phrase("files.limit", { size: bytes(model.get("max_file")) });
  const hint = make("span", { class: "se-hint" }, limit);
  // Its own place, so that nothing moves when it speaks.
  const said = make("p", { class: "se-hint se-files-said", role: "alert" });
  const element = make("div", { class: "se-files", role: "group", "aria-label": phrase("files.name") }, ...saves.map(([, , one]) => one), make("span", { class: "se-files-load" }, load, input, hint), said);

  async function send(file) {
    say(said, "");
    const most = model.get("max_file");
    if (file.size > most) {
      say(said, phrase("files.too_large", { file: file.name, size: bytes(file.size), limit: bytes(most) }));
      return;
    }
    try {
      model.send({ do: "load_recipe", text: await file.text() });
    } catch {
      say(said, phrase("files.unreadable", { file: file.name }));
    }
  }
  input.addEventListener("change", () => {
    const [file] = input.files;
    // So that the same file, corrected, can be chosen again.
    if (file) send(file).finally(() => { input.value = ""; });
  }, { signal });

  function update(view) {
    const why = view.files ?? {};
    for (const [what, help, one] of saves) {
      one.disabled = Boolean(why[what]);
      setOne(one, "title", why[what] ? phrase("files.tip_not_now", { help, why: why[what] }) : help);
    }
    load.disabled = Boolean(why.load);
    const help = phrase("files.load_tip");
    setOne(load, "title", why.load ? phrase("files.tip_not_now", { help, why: why.load }) : help);
  }
  return { element, update };
}
