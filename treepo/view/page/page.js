"use strict";
// The frame of the page: its tabs, the questions to the server, and what the parts share (`window.view`).
// Text from models, data files and folders is untrusted: it only ever becomes a text node.

const data = JSON.parse(document.getElementById("data").textContent);
const key = (question, query) => JSON.stringify([question, ...Object.entries(query).map(([k, v]) => `${k}=${v}`).sort()]);
const answers = data.answers && new Map(data.answers.map(([question, query, answer]) => [key(question, query), answer]));
const parts = new Map();
const tabs = new Map();

async function ask(question, query = {}) {
  if (answers) {
    const known = key(question, query);
    if (!answers.has(known)) throw new Error("This exported file does not have it; `treepo view` without --export does.");
    return answers.get(known);
  }
  const response = await fetch(`api/${question}?${new URLSearchParams(query)}`).catch(() => {
    throw new Error("`treepo view` has ended.");
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// An element with properties or attributes, and children that are elements or text.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// Calls the function at once and, in a live page that is looked at, again so many seconds after it has ended.
async function repeat(seconds, call) {
  for (;;) {
    if (!document.hidden) await call();
    if (answers) return;
    await new Promise((done) => setTimeout(done, 1000 * seconds));
  }
}

// The value of a colour of page.css, for what draws on a canvas.
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function open(name, place = "") {
  location.hash = place ? `${name}/${place}` : name;
}

function showPlace() {
  const [, wanted, place] = /^#?([^/]*)\/?(.*)$/.exec(location.hash);
  const shown = parts.has(wanted) ? wanted : (data.parts.find((part) => !part.empty) ?? data.parts[0]).name;
  for (const [name, { tab, panel }] of tabs) {
    tab.setAttribute("aria-selected", name === shown);
    tab.tabIndex = name === shown ? 0 : -1;
    panel.hidden = name !== shown;
  }
  parts.get(shown)(tabs.get(shown).panel, decodeURIComponent(place));
}

function moveTab(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const all = [...event.currentTarget.children];
  const next = all[(all.indexOf(document.activeElement) + step + all.length) % all.length];
  next.focus();
  next.click();
}

function start() {
  const list = document.querySelector("[role=tablist]");
  for (const { name, title } of data.parts) {
    const tab = make("button", { id: `tab-${name}`, role: "tab", "aria-controls": name, onclick: () => open(name) }, title);
    const panel = make("section", { id: name, role: "tabpanel", "aria-labelledby": tab.id });
    tabs.set(name, { tab, panel });
    list.append(tab);
    document.querySelector("main").append(panel);
  }
  list.addEventListener("keydown", moveTab);
  window.addEventListener("hashchange", showPlace);
  showPlace();
}

window.view = {
  sources: data.sources, live: !answers, ask, make, repeat, colour, open,
  part: (name, show) => parts.set(name, show),
};
document.addEventListener("DOMContentLoaded", start);
