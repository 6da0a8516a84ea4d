// How the words are chosen: what the form says, and how it says it.

import { $ } from "./dom.js";

const settings = $("settings");
const HINTS = {
  beam: "Follows several sentences at once and keeps the most probable.",
  greedy: "Takes the most probable word each time: the fastest, one caption only.",
  sample: "Draws each word by chance: captions are livelier, and wrong more often.",
};
const ALTERNATIVES = 5;

export function readSettings() {
  const { method, max_words, beam_size, temperature } = settings.elements;
  const chosen = { method: method.value, max_words: max_words.value };
  if (chosen.method === "beam") {
    chosen.beam_size = beam_size.value;
    chosen.n = Math.min(ALTERNATIVES, beam_size.value); // more would widen the search
  }
  if (chosen.method === "sample") Object.assign(chosen, { n: ALTERNATIVES, temperature: temperature.value });
  return chosen;
}

export function showSettings() {
  const method = settings.elements.method.value;
  $("method-hint").textContent = HINTS[method] ?? "";
  for (const part of settings.querySelectorAll("[data-for]")) part.hidden = part.dataset.for !== method;
  const units = { max_words: ["word", "words"], beam_size: ["beam", "beams"] };
  for (const output of settings.querySelectorAll("output")) {
    const [name] = output.htmlFor;
    const value = settings.elements[name].value;
    const unit = units[name]?.[Number(value === "1" ? 0 : 1)] ?? "";
    output.value = `${value} ${unit}`.trim();
    settings.elements[name].setAttribute("aria-valuetext", output.value);
  }
}

function offer(method) {
  const last = settings.querySelector(".choices").lastElementChild;
  const [button, label] = last.parentElement.appendChild(last.cloneNode(true)).children;
  button.value = method;
  label.textContent = method;
}

export function setDefaults({ method, beam_size, temperature, max_words }) {
  method.choices.filter((name) => !(name in HINTS)).forEach(offer); // methods added since
  settings.elements.method.value = method.default;
  settings.elements.beam_size.value = beam_size.default;
  settings.elements.temperature.value = temperature.default;
  settings.elements.max_words.max = max_words.most;
  settings.elements.max_words.value = max_words.default ?? max_words.most;
  showSettings();
}

settings.addEventListener("input", showSettings);
settings.addEventListener("submit", (event) => event.preventDefault());
