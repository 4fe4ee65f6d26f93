"use strict";
const { make, sources, part } = window.view;
part("run", (root) => {
  if (!root.childElementCount) root.append(make("ul", {}, ...sources.map((source) => make("li", {}, `${source.name}: ${source.path}`))));
});
