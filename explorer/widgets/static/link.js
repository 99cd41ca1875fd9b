// Words between the widgets of one page, past the kernel: what the hand does in one is seen in the others in the same frame.

/** Tell the other widgets of this page. `what` is "preview" (figures while bars are dragged, or null) or "point" (a layer that is pointed at, or null). */
function tellPage(model, what, detail) {
  document.dispatchEvent(new CustomEvent(`se-${what}`, { detail: { page: model.get("page"), of: detail } }));
}

/** Call `act(detail)` when another widget of this page tells `what`. */
function hearPage(model, what, act, signal) {
  document.addEventListener(`se-${what}`, (event) => { if (event.detail.page === model.get("page")) act(event.detail.of); }, { signal });
}
