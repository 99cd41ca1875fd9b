// Files of what there is now, to take along, and a recipe to bring back.

const SAVES = [
  ["recipe", "Save recipe", "The sparsity of each layer and how to train, as YAML: load it here again, or run it with sparsity-explorer prune --recipe"],
  ["measurements", "Save measurements", "Every measured point as CSV: layer, sparsity, kind, value, spread"],
  ["report", "Save report", "Figures, charts and recipe as one HTML file that opens anywhere, without this page"],
];

function bytes(size) {
  const [value, unit] = size >= 1e5 ? [size / 1048576, "MB"] : [size / 1024, "kB"];
  return `${value.toFixed(1).replace(/\.0$/, "")} ${unit}`;
}

/** Make the row. Returns its element and `update(view)`. */
function filesRow(model, signal) {
  const saves = SAVES.map(([what, label, help]) => [what, help, button(label, () => model.send({ do: "save", what }), signal)]);
  const input = make("input", { type: "file", accept: ".yaml,.yml,.json,application/yaml,application/json", hidden: true, "aria-label": "Recipe file" });
  const load = button("Load a recipe", () => input.click(), signal);
  const limit = `YAML or JSON, at most ${bytes(model.get("max_file"))}`;
  const hint = make("span", { class: "se-hint" }, limit);
  // Its own place, so that nothing moves when it speaks.
  const said = make("p", { class: "se-hint se-files-said", role: "alert" });
  const element = make("div", { class: "se-files", role: "group", "aria-label": "Files" }, ...saves.map(([, , one]) => one), make("span", { class: "se-files-load" }, load, input, hint), said);

  async function send(file) {
    say(said, "");
    const most = model.get("max_file");
    if (file.size > most) {
      say(said, `${file.name} has ${bytes(file.size)}, and at most ${bytes(most)} are sent. A recipe is a short text: choose the recipe.yaml of a result, or a file that Save recipe made.`);
      return;
    }
    try {
      model.send({ do: "load_recipe", text: await file.text() });
    } catch {
      say(said, `${file.name} could not be read; check that it is still there, and choose it again.`);
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
      setOne(one, "title", why[what] ? `${help}. ${why[what]}.` : help);
    }
    load.disabled = Boolean(why.load);
    const help = "Take the bars and the settings of a run from a recipe, or the bars from a distribution; Undo brings the present ones back";
    setOne(load, "title", why.load ? `${help}. ${why.load}.` : help);
  }
  return { element, update };
}
