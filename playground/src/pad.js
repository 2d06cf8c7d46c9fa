// The drawing pad: mouse, finger, pen or keyboard draws; a picture can lie on it.

const COLOURS = {
  black: "#26262b", gray: "#8f9196", white: "#ffffff", brown: "#7f5533", red: "#d63333",
  orange: "#f59433", yellow: "#f7e059", green: "#45a854", blue: "#386bd6", purple: "#8c4fbd",
  pink: "#f7a8c7",
};

export class Pad {
  /** onChange: called after each stroke and each picture. */
  constructor(canvas, { colours, size, clear, undo }, onChange) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.size = size;
    this.onChange = onChange;
    this.past = [];
    this.undoButton = undo;
    this.pen = { x: 128, y: 128 };
    this.wipe();
    this.swatches(colours);
    clear.onclick = () => { this.keep(); this.wipe(); this.onChange(null); };
    undo.onclick = () => this.undo();
    canvas.onpointerdown = (event) => this.start(event);
    canvas.onkeydown = (event) => this.key(event);
    canvas.onblur = () => this.showPen(false);
  }

  swatches(box) {
    box.append(...Object.entries(COLOURS).map(([name, colour], i) => {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", title: name, tabIndex: i ? -1 : 0 });
      button.style.background = colour;
      button.setAttribute("role", "radio");
      button.setAttribute("aria-label", name);
      button.onclick = () => this.pick(box, button, colour);
      return button;
    }));
    box.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const all = [...box.children], at = all.indexOf(document.activeElement);
      const next = all[(at + step + all.length) % all.length];
      next.click();
      next.focus();
    };
    this.pick(box, box.children[4], COLOURS.red);
  }

  pick(box, button, colour) {
    this.colour = colour;
    for (const other of box.children) {
      other.setAttribute("aria-checked", other === button);
      other.tabIndex = other === button ? 0 : -1;
    }
  }

  wipe() {
    this.context.fillStyle = "#fff";
    this.context.fillRect(0, 0, 256, 256);
  }

  /** Put a picture (canvas, ImageBitmap) on the pad, its centre square, on white. */
  show(image) {
    this.keep();
    this.wipe();
    const { width, height } = image, side = Math.min(width, height);
    this.context.drawImage(image, (width - side) / 2, (height - side) / 2, side, side, 0, 0, 256, 256);
  }

  keep() {
    this.past.push(this.context.getImageData(0, 0, 256, 256));
    if (this.past.length > 20) this.past.shift();
    this.undoButton.disabled = false;
  }

  undo() {
    const last = this.past.pop();
    if (last) this.context.putImageData(last, 0, 0);
    this.undoButton.disabled = !this.past.length;
    this.onChange(this.pixels());
  }

  /** {rgba, width, height}. */
  pixels() {
    return { rgba: this.context.getImageData(0, 0, 256, 256).data, width: 256, height: 256 };
  }

  start(event) {
    if (event.button) return;
    event.preventDefault();
    this.canvas.focus();
    this.canvas.setPointerCapture(event.pointerId);
    this.keep();
    const at = (e) => {
      const box = this.canvas.getBoundingClientRect(), scale = 256 / box.width;
      return { x: (e.clientX - box.left) * scale, y: (e.clientY - box.top) * scale };
    };
    let last = at(event);
    this.line(last, last);
    this.canvas.onpointermove = (e) => {
      for (const part of e.getCoalescedEvents?.() ?? [e]) {
        const next = at(part);
        this.line(last, next);
        last = next;
      }
    };
    this.canvas.onpointerup = this.canvas.onpointercancel = () => {
      this.canvas.onpointermove = this.canvas.onpointerup = this.canvas.onpointercancel = null;
      this.onChange(this.pixels());
    };
  }

  line(from, to) {
    const c = this.context;
    Object.assign(c, { strokeStyle: this.colour, lineWidth: this.size.valueAsNumber, lineCap: "round" });
    c.beginPath();
    c.moveTo(from.x, from.y);
    c.lineTo(to.x + 0.01, to.y);
    c.stroke();
  }

  key(event) {  // arrows move, with space held or switched on they draw
    const step = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] }[event.key];
    if (event.key === " ") {
      event.preventDefault();
      this.showPen(false);
      this.drawing = !this.drawing;
      if (this.drawing) { this.keep(); this.line(this.pen, this.pen); } else this.onChange(this.pixels());
    } else if (step) {
      event.preventDefault();
      this.showPen(false);
      const next = {
        x: Math.min(256, Math.max(0, this.pen.x + step[0])),
        y: Math.min(256, Math.max(0, this.pen.y + step[1])),
      };
      if (this.drawing) this.line(this.pen, next);
      this.pen = next;
    } else if (event.key === "Escape" && this.drawing) {
      this.drawing = false;
      this.onChange(this.pixels());
      return;
    } else return;
    this.showPen(true);
  }

  showPen(on) {  // a ring under the keyboard's pen, which is not part of the picture
    const c = this.context, { x, y } = this.pen;
    if (this.under) c.putImageData(this.under, this.underAt.x, this.underAt.y);
    this.under = null;
    if (!on) {
      if (this.drawing && document.activeElement !== this.canvas) {
        this.drawing = false;
        this.onChange(this.pixels());
      }
      return;
    }
    this.underAt = { x: x - 10, y: y - 10 };
    this.under = c.getImageData(x - 10, y - 10, 20, 20);
    Object.assign(c, { strokeStyle: this.drawing ? "#d63333" : "#555", lineWidth: 2 });
    c.beginPath();
    c.arc(x, y, 7, 0, 7);
    c.stroke();
  }
}
