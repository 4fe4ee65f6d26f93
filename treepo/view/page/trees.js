"use strict";
// The part "Trees": the list, the drawing of a tree, and the texts on the path down to one of its nodes.
// The address says what is shown: SOURCE/TREE/NODE, where node 0 is the prompt, or SOURCE/step-STEP.

const { ask, make, open, part, repeat, sources } = window.view;
const { TreeDrawing, TreeList, count, decimal, describe, mix, outline, visible } = window.view.trees;
const REFRESH_SECONDS = 3;
const SHADED = -0.1; // tokens of a lower log-prob are shaded,
const DARKEST = -6; // and at this one as dark as can be

class TreePage {
  constructor(root) {
    this.place = this.drawn = null;
    this.list = new TreeList();
    this.drawing = new TreeDrawing((node) => this.open(node));
    this.head = make("div", { className: "bar" });
    this.fault = make("p", { className: "fault", role: "alert" });
    this.text = make("div", { className: "text" });
    this.hint = make("p", { className: "soft" }, "Choose a tree in the list.");
    this.detail = make("div", {}, this.head, this.drawing.element, this.text);
    root.append(this.list.element, make("div", { className: "card detail" }, this.fault, this.hint, this.detail));
    repeat(REFRESH_SECONDS, () => this.list.read());
  }

  open(node) {
    open("trees", `${this.place.source}/${this.place.tree}/${node}`);
  }

  // Carries out an action and shows its failure.
  async showing(action) {
    try {
      await action();
      this.fault.textContent = "";
    } catch (error) {
      this.fault.textContent = visible(error.message);
    }
  }

  async show(address) {
    const [source, tree, node] = address.split("/").map((text) => (/^\d{1,15}$/.test(text) ? Number(text) : null));
    const [, step] = /^\d+\/step-(\d{1,15})$/.exec(address) ?? [];
    const place = (this.place = { source: sources[source] ? source : 0, tree: tree ?? null, node: node ?? 0 });
    this.list.select(place.source, place.tree);
    if (step) this.list.showStep(Number(step));
    const drawn = `${place.source}/${place.tree}`;
    this.detail.hidden = this.drawn !== drawn;
    this.hint.hidden = place.tree !== null;
    if (place.tree === null) return;
    if (this.drawn !== drawn) {
      const { trees } = this.list;
      while (place.tree >= trees.count && await trees.readSome());
      const answer = await ask("trees/tree", { source: place.source, tree: place.tree });
      if (this.place !== place) return; // something else was chosen meanwhile
      this.drawn = drawn;
      this.showHead(answer);
      this.drawing.draw(answer, 0);
      this.detail.hidden = false;
      this.list.select(place.source, place.tree);
    }
    this.drawing.select(this.drawing.find(place.node) ? place.node : 0);
    await this.showPath(this.drawing.find(this.drawing.node));
  }

  showHead({ id, step, answer, untrained }) {
    const facts = [
      step === null ? "" : `step ${step}`,
      answer ? `gold answer ${answer}` : "",
      untrained ? `no advantages: ${untrained}` : "",
    ];
    this.head.replaceChildren(
      make("h2", {}, visible(id)), make("span", { className: "soft" }, visible(facts.filter(Boolean).join(" · "))));
  }

  async showPath(node) {
    const { answer } = this.drawing;
    const path = node.ancestors().reverse();
    const tokens = path.map(() => make("p", { className: "tokens" }));
    const blocks = path.map((one, at) =>
      make("section", { className: one === node ? "chosen" : "" }, make("h3", {}, describe(one, answer)), tokens[at]));
    const values = node.leaf ? Object.entries({ answer: node.leaf.answer, ...node.leaf.values }) : [];
    const found = values.filter(([, value]) => value !== null).map(([name, value]) => make("p", {}, visible(`${name}: ${value}`)));
    const below = (node.children ?? []).map((child) =>
      make("button", { onclick: () => this.open(child.data.node) }, `▸ ${outline(child)}`));
    const hint = make("p", { className: "soft" }, "The less likely a token was, the stronger its colour. Point at one for its log-prob.");
    this.text.replaceChildren(hint, ...blocks, ...found, ...below);
    const { source, tree } = this.place;
    const sizes = path.map((one) => (one.parent ? one.data.tokens : answer.prompt_tokens));
    const missing = await Promise.all(path.map((one, at) => this.addTokens(tokens[at], { source, tree, node: one.data.node }, sizes[at])));
    if (missing[0] && blocks[0].isConnected) this.text.prepend(make("p", { className: "soft" }, visible(`Tokens are shown as numbers: ${missing[0]}`)));
  }

  // Adds the next tokens of a node to its element; returns why they are numbers, or null.
  async addTokens(element, place, all) {
    const from = element.querySelectorAll("span").length;
    const answer = await ask("trees/text", { ...place, from });
    element.querySelector("button")?.remove();
    element.append(...answer.texts.map((text, at) => makeToken(text, answer.tokens[at], answer.log_probs?.[at], from + at)));
    const shown = from + answer.tokens.length;
    if (shown < all) {
      const more = () => this.showing(() => this.addTokens(element, place, all));
      element.append(make("button", { onclick: more }, `more (${shown.toLocaleString("en")} of ${count(all, "token")} are shown)`));
    }
    return answer.missing;
  }
}

function makeToken(text, token, logProb, at) {
  const known = logProb === undefined ? "" : `: log-prob ${decimal(logProb, 3)}, ${(100 * Math.exp(logProb)).toFixed(1)}%`;
  const element = make("span", { title: `token ${at + 1}, number ${token}${known}` }, visible(text).replaceAll("\n", "↵\n"));
  if (logProb < SHADED) element.style.background = mix(0.75 * Math.min(1, logProb / DARKEST), "transparent", "var(--warning)");
  return element;
}

let page = null;
part("trees", (root, address) => {
  page ??= new TreePage(root);
  page.showing(() => page.show(address));
});
