// The few words in which the modules build a page. Text always goes in as text, never as markup.
// This file is put in front of each module, behind the language of the page as LANGUAGE, see assets.py.

/** Make an HTML element. `props` are attributes; null and false are left out, true gives an empty attribute. */
function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  setAll(element, props);
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Make an SVG element. */
function draw(tag, props = {}, text = null) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  setAll(element, props);
  if (text !== null) element.textContent = text;
  return element;
}

function setAll(element, props) {
  for (const [name, value] of Object.entries(props)) setOne(element, name, value);
}

/** Set one attribute, but touch the page only when it changes: a live region that is rewritten is read out again. */
function setOne(element, name, value) {
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else {
    const text = value === true ? "" : String(value);
    if (element.getAttribute(name) !== text) element.setAttribute(name, text);
  }
}

/** Set the text of an element when it changes. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const plurals = new Intl.PluralRules(LANGUAGE);

/**
 * A sentence of the page. In the source its key stands here, see explorer/widgets/texts; the page gets the sentence itself, see assets.py.
 * `values` fill its placeholders; where it has plural forms, `values.count` chooses one.
 */
function phrase(sentence, values = {}) {
  const form = typeof sentence === "string" ? sentence : sentence[plurals.select(values.count)] ?? sentence.other;
  return form.replace(/\{(\w+)\}/g, (_, name) => {
    if (values[name] === undefined) throw new Error(`"${form}" was not given ${name}`);
    return String(values[name]);
  });
}

/** A button that sends a gesture to the kernel or calls a function. */
function button(label, act, signal, props = {}) {
  const element = make("button", { type: "button", ...props }, label);
  element.addEventListener("click", act, { signal });
  return element;
}

/** Call `update` now and on each change of the named traits; undone when `signal` aborts. */
function follow(model, names, update, signal) {
  for (const name of names) model.on(`change:${name}`, update);
  signal.addEventListener("abort", () => {
    for (const name of names) model.off(`change:${name}`, update);
  });
  update();
}

/** Put a widget's own part into the page, as a landmark with a name. */
function section(el, label, className, step = null) {
  dress();
  const root = make("section", { class: `se ${className}`, lang: LANGUAGE, "aria-label": label, "data-se-step": step });
  // JupyterLab would take keys that are pressed here as its own, and cut the cell at an "x" on a bar. It looks at the focused element before those around it.
  root.addEventListener("focusin", (event) => event.target.setAttribute("data-lm-suppress-shortcuts", "true"));
  root.addEventListener("keydown", keepKey);
  el.replaceChildren(root);
  return root;
}

/** Keep a key that moves, types or presses in the page, and one that a gesture has taken: VS Code takes what leaves it, and deletes the cell at "d d". */
function keepKey(event) {
  const commands = event.ctrlKey || event.metaKey || event.altKey;
  const moves = event.key.length === 1 || /^(Arrow|Page)|^(Home|End|Enter|Backspace|Delete)$/.test(event.key);
  if ((moves && !commands) || event.defaultPrevented) event.stopPropagation();
}

const THEME_KEY = "sparsity-explorer-theme";

/** Which theme holds: the reader's choice, else that of JupyterLab, VS Code or Colab around us, else that of the system. */
function theme() {
  let chosen = null;
  try {
    chosen = localStorage.getItem(THEME_KEY);
  } catch {
    // A page without storage follows its surroundings.
  }
  if (chosen === "light" || chosen === "dark") return chosen;
  const lab = document.body.dataset.jpThemeLight;
  if (lab !== undefined && document.body.dataset.voila === undefined) return lab === "false" ? "dark" : "light";
  const code = document.body.dataset.vscodeThemeKind;
  if (code !== undefined) return code.includes("light") ? "light" : "dark";
  if (document.documentElement.getAttribute("theme") === "dark") return "dark";
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

/** Dress the document, and at the first time see to it that it changes with what is around it. */
function dress() {
  const root = document.documentElement;
  if (root.dataset.seTheme === undefined) {
    const around = new MutationObserver(dress);
    around.observe(document.body, { attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind"] });
    around.observe(root, { attributeFilter: ["theme"] });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dress);
  }
  if (root.dataset.seTheme !== theme()) root.dataset.seTheme = theme();
}

const words = {
  /** Three significant digits, and nothing below a tenth of a microsecond: a latency is not known better. */
  ms: (value) => (value === null || value === undefined ? "–" : value >= 100 ? value.toFixed(0) : value >= 0.1 ? value.toPrecision(3) : value.toFixed(value >= 0.01 ? 3 : 4)),
  /** A spread has the decimals of its value, or one digit where those would be zeros. */
  spread: (value, spread) => {
    const text = spread.toFixed(words.ms(value).split(".")[1]?.length ?? 0);
    return Number(text) || !spread ? text : String(Number(spread.toPrecision(1)));
  },
  percent: (fraction, digits = 1) =>
    fraction === null || fraction === undefined ? "–" : `${(100 * fraction).toFixed(digits)} %`,
  /** 1234567 as "1.23 M". */
  count: (value) => {
    for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (value >= size) return `${(value / size).toPrecision(3)} ${unit}`;
    return String(value);
  },
  small: (value) =>
    value === null || value === undefined ? "–" : value === 0 ? "0" : value < 0.001 ? value.toExponential(0) : value.toPrecision(2),
  time: (seconds) => {
    if (seconds === null || seconds === undefined) return "";
    const whole = Math.max(0, Math.round(seconds));
    return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")} min`;
  },
};

/** Where a KL divergence lies on the colour ramp, 0 to 1: three decades, from 0.003 to 3 nats. */
function tone(kl) {
  return kl === null || kl === undefined ? null : Math.min(1, Math.max(0, (Math.log10(Math.max(kl, 1e-9) / 3) + 3) / 3));
}

/** The colour of a tone, mixed by the style sheet's own colours so that themes stay in one place. */
function rampColour(place) {
  if (place === null) return "var(--se-edge)";
  const stop = Math.min(2, Math.floor(place * 3));
  return `color-mix(in oklab, var(--se-ramp-${stop + 1}) ${(100 * (place * 3 - stop)).toFixed(0)}%, var(--se-ramp-${stop}))`;
}

/** Value of a measured curve `[sparsities, values]` between its points; null outside. */
function between(curve, sparsity) {
  if (!curve || !curve[0].length) return null;
  const [xs, ys] = curve;
  if (sparsity <= xs[0]) return sparsity < xs[0] - 1e-9 ? null : ys[0];
  for (let i = 1; i < xs.length; i++)
    if (sparsity <= xs[i] + 1e-9) return ys[i - 1] + ((ys[i] - ys[i - 1]) * (sparsity - xs[i - 1])) / (xs[i] - xs[i - 1]);
  return null;
}
