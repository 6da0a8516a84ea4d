// Where the model attended to when it wrote a word: the photo is dimmed elsewhere.

import { $, make } from "./dom.js";

const SMOOTHED = 7; // rows and columns: a map of fewer is shown as the cells it is

export function hideAttention(hint) {
  $("veil").classList.remove("shown");
  $("look").textContent = hint;
}

export function showAttention(word, map) {
  drawVeil(map);
  $("veil").classList.add("shown");
  $("look").replaceChildren();
  make("q", word, $("look"));
  const cells = isSmall(map) ? `, of the ${map.length} × ${map[0].length} parts that this model sees` : "";
  $("look").append(` looked most at the ${region(map)}${cells}`);
}

const isSmall = (map) => Math.min(map.length, map[0].length) < SMOOTHED;

function drawVeil(map) {
  const [rows, columns, fine] = [map.length, map[0].length, 24];
  const all = map.flat();
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const small = isSmall(map);
  const veil = $("veil");
  [veil.width, veil.height] = [columns * fine, rows * fine];
  const context = veil.getContext("2d");
  const pixels = context.createImageData(veil.width, veil.height);
  for (let y = 0; y < veil.height; y++) {
    for (let x = 0; x < veil.width; x++) {
      const value = small
        ? map[Math.floor(y / fine)][Math.floor(x / fine)]
        : between(map, (y + 0.5) / fine - 0.5, (x + 0.5) / fine - 0.5);
      const share = high > low ? (value - low) / (high - low) : 1;
      pixels.data[4 * (y * veil.width + x) + 3] = 200 * (1 - share) ** 1.3;
    }
  }
  context.putImageData(pixels, 0, 0);
}

function between(grid, y, x) {
  // Smooth steps between the middles of the cells, flat beyond the outermost.
  const [top, down] = neighbours(y, grid.length);
  const [left, across] = neighbours(x, grid[0].length);
  const mix = (row) => grid[row][left] * (1 - across) + grid[row][Math.min(left + 1, grid[0].length - 1)] * across;
  return mix(top) * (1 - down) + mix(Math.min(top + 1, grid.length - 1)) * down;
}

function neighbours(place, count) {
  const held = Math.max(0, Math.min(place, count - 1));
  const first = Math.floor(held);
  const part = held - first;
  return [first, part * part * (3 - 2 * part)];
}

function region(map) {
  const best = map.flat().reduce((top, value, index, all) => (value > all[top] ? index : top), 0);
  const third = (place, count) => Math.floor(((place + 0.5) / count) * 3);
  const row = ["top", "middle", "bottom"][third(Math.floor(best / map[0].length), map.length)];
  const column = ["left", "middle", "right"][third(best % map[0].length, map[0].length)];
  return row === column ? "middle" : column === "middle" ? `${row} middle` : row === "middle" ? `${column} side` : `${row} ${column}`;
}
