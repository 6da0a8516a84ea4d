// What all parts of the page use.

export const $ = (id) => document.getElementById(id);

export function make(tag, text, parent) {
  const element = document.createElement(tag);
  element.textContent = text;
  parent.append(element);
  return element;
}

export const touch = matchMedia("(pointer: coarse)").matches;

export const megabytes = (bytes) => (bytes / 1e6).toPrecision(3).replace(/\.?0+$/, "");

export function percent(share) {
  const whole = 100 * share;
  return whole > 0 && whole < 1 ? "below 1 %" : `${Math.round(whole)} %`;
}

export async function copy(text, button) {
  const before = button.textContent;
  if (button.dataset.busy) return;
  button.dataset.busy = "true";
  button.textContent = (await copied(text, button)) ? "Copied" : "Not copied";
  $("status").textContent = `${button.textContent}.`;
  setTimeout(() => {
    button.textContent = before;
    delete button.dataset.busy;
  }, 2000);
}

async function copied(text, button) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch { /* not allowed: the old way may be */ }
  }
  // Without https there is no clipboard but this one.
  const area = make("textarea", text, document.body);
  area.className = "unseen";
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  button.focus();
  return done;
}
