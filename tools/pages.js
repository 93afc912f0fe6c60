"use strict";
// Shared by the pages of tools/: elements, pictures, and one style of heat map. Inserted into each page when it is written.

/** An element with attributes (null and false are left out) and children; text is never parsed as HTML. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const counted = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
const paragraph = (text) => make("p", {}, text);
const placeName = (patch, columns) => `row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;

const CELL = 32; // pixels of the canvas for a patch
const LARGEST = 0.85; // side of the square of the hottest patch, as a share of the patch

/** A square of some heat, 0 to 1, in a cell of a canvas; its area is proportional to the heat. */
function square(pen, column, row, heat) {
  const side = LARGEST * CELL * Math.sqrt(heat), x = (column + 0.5) * CELL - side / 2, y = (row + 0.5) * CELL - side / 2;
  if (side < 3) return;
  pen.fillStyle = "rgba(255, 96, 0, 0.45)";
  pen.fillRect(x, y, side, side);
  for (const [colour, out] of [["#fff", 1], ["#000", 2.5]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = 1.5;
    pen.strokeRect(x - out + 1, y - out + 1, side + 2 * out - 2, side + 2 * out - 2);
  }
}

/**
 * A picture that can show a map. heat(levels from 0 to 255, by patch) draws a square in each patch and a frame around the
 * hottest, and returns its number, -1 if there is none; hide(numbers of patches) covers patches; heat(null) clears all.
 */
function framed(picture, alt, [rows, columns], shape = picture) {
  const canvas = make("canvas", { width: columns * CELL, height: rows * CELL, "aria-hidden": "true" });
  const hottest = make("span", { class: "hottest", hidden: true });
  const image = make("img", { src: picture.src, alt, width: picture.width, height: picture.height, class: picture.crisp ? "crisp" : null });
  const frame = make("span", { class: "frame", style: `aspect-ratio: ${shape.width} / ${shape.height}` }, image, canvas, hottest);
  const pen = canvas.getContext("2d");
  function clear() {
    pen.clearRect(0, 0, canvas.width, canvas.height);
    hottest.hidden = true;
  }
  function heat(levels) {
    clear();
    if (!levels) return -1;
    levels.forEach((level, patch) => square(pen, patch % columns, Math.floor(patch / columns), level / 255));
    const best = levels.indexOf(Math.max(...levels));
    if (levels[best] === 0) return -1;
    hottest.hidden = false;
    Object.assign(hottest.style, {
      left: `${(100 * (best % columns)) / columns}%`, width: `${100 / columns}%`,
      top: `${(100 * Math.floor(best / columns)) / rows}%`, height: `${100 / rows}%`,
    });
    return best;
  }
  function hide(patches) {
    clear();
    pen.fillStyle = "#12141c";
    for (const patch of patches) pen.fillRect((patch % columns) * CELL, Math.floor(patch / columns) * CELL, CELL, CELL);
  }
  return { frame, heat, hide, image, canvas };
}

/** The scale of all maps: squares for 10, 50 and 100 % of the heat of the hottest patch. */
function scaleOfMaps() {
  const canvas = make("canvas", { width: 3 * CELL, height: CELL, "aria-hidden": "true", class: "scale" }), pen = canvas.getContext("2d");
  [0.1, 0.5, 1].forEach((heat, column) => square(pen, column, 0, heat));
  return make("span", { class: "soft scale" }, canvas, "10, 50 and 100 % of the heat of the hottest patch");
}

/** A caption from pairs [word, whether it has a map]; words with a map are buttons. Tab reaches the caption, arrow keys its words; show(number, word, button) updates the map. */
function captionOf(words, text, mapped, show) {
  const buttons = [];
  const line = make("div", { class: "text", ...(mapped ? { role: "toolbar", "aria-label": `words of: ${text}` } : {}) });
  const add = (word, whole) => {
    const number = buttons.length;
    const button = make("button", { type: "button", "aria-pressed": "false", tabindex: number ? -1 : 0, class: whole ? "whole" : null, "aria-label": whole && "whole caption" }, word);
    for (const event of ["pointerenter", "focus", "click"])
      button.addEventListener(event, () => show(number, whole ? "the whole caption" : `“${word}”`, button));
    button.addEventListener("keydown", (event) => {
      const target = { ArrowRight: number + 1, ArrowLeft: number - 1, Home: 0, End: buttons.length - 1 }[event.key];
      if (target === undefined) return;
      event.preventDefault();
      buttons.at(target % buttons.length).focus();
    });
    button.addEventListener("focus", () => buttons.forEach((one) => (one.tabIndex = one === button ? 0 : -1)));
    button.number = number;
    buttons.push(button);
    line.append(button);
  };
  for (const [word, own] of words) own ? add(word, false) : line.append(make("span", {}, word));
  if (mapped) add("whole", true);
  return line;
}
