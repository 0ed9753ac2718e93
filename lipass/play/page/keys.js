// Turns keys, pointer and thumb into what is asked of the next chunk.
const KEYS = {
  KeyW: "w", KeyS: "s", KeyA: "a", KeyD: "d", KeyQ: "l", KeyE: "r",
  ArrowUp: "w", ArrowDown: "s", ArrowLeft: "l", ArrowRight: "r",
};
const FOV_DEG = 75;
const SEND_MS = 40;
const LOOK_MOST = 360;

export class Keys {
  // `ask` gets { ahead, aside, turn, yaw, pitch }, whole numbers, when something changes.
  constructor({ stage, pad, knob, keys, ask }) {
    this.ask = ask;
    this.held = new Set();
    this.thumb = [0, 0];
    this.look = [0, 0];
    this.timer = 0;
    const shown = [...keys.querySelectorAll("[data-key]")];
    const show = () => shown.forEach((one) => one.classList.toggle("held", this.held.has(one.dataset.key)));
    const typing = (event) => event.target.matches("input, select, textarea");

    addEventListener("keydown", (event) => {
      const key = KEYS[event.code];
      if (!key || typing(event) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      if (event.repeat || this.held.has(key)) return;
      this.held.add(key);
      show();
      this.send();
    });
    const release = (event) => {
      if (!this.held.delete(KEYS[event.code])) return;
      show();
      this.send();
    };
    addEventListener("keyup", release);
    const release_all = () => {
      if (!this.held.size && !this.thumb.some(Boolean)) return;
      this.held.clear();
      this.thumb = [0, 0];
      show();
      this.send();
    };
    addEventListener("blur", release_all);
    document.addEventListener("visibilitychange", release_all);

    for (const screen of stage.querySelectorAll(".screen")) this.looks(screen);
    this.walks(pad, knob);
  }

  looks(screen) {
    let from = null;
    const by = (dx, dy, width) => {
      const degrees = FOV_DEG / width;
      this.look[0] += dx * degrees;
      this.look[1] -= dy * degrees;
      this.send_soon();
    };
    screen.addEventListener("pointerdown", (event) => {
      from = [event.clientX, event.clientY];
      screen.setPointerCapture(event.pointerId);
    });
    screen.addEventListener("pointermove", (event) => {
      if (document.pointerLockElement === screen) by(event.movementX, event.movementY, screen.clientWidth);
      else if (from) {
        by(event.clientX - from[0], event.clientY - from[1], screen.clientWidth);
        from = [event.clientX, event.clientY];
      }
    });
    screen.addEventListener("pointerup", () => (from = null));
    screen.addEventListener("pointercancel", () => (from = null));
    screen.addEventListener("dblclick", () => screen.requestPointerLock?.());
  }

  walks(pad, knob) {
    const move = (x, y) => {
      const far = Math.hypot(x, y);
      const reach = Math.min(1, 40 / (far || 1));
      knob.style.transform = `translate(${x * reach}px, ${y * reach}px)`;
      const thumb = far < 12 ? [0, 0] : [x / far, -y / far].map((part) => Math.round(part * 0.9));
      if (thumb.join() === this.thumb.join()) return;
      this.thumb = thumb;
      this.send();
    };
    const follow = (event) => {
      const box = pad.getBoundingClientRect();
      move(event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2);
    };
    pad.addEventListener("pointerdown", (event) => {
      pad.setPointerCapture(event.pointerId);
      follow(event);
    });
    pad.addEventListener("pointermove", (event) => event.buttons && follow(event));
    for (const end of ["pointerup", "pointercancel"]) pad.addEventListener(end, () => move(0, 0));
  }

  send_soon() {
    this.timer ||= setTimeout(() => this.send(), SEND_MS);
  }

  send() {
    clearTimeout(this.timer);
    this.timer = 0;
    const axis = (plus, minus, thumb = 0) =>
      Math.max(-1, Math.min(1, this.held.has(plus) - this.held.has(minus) + thumb));
    const [yaw, pitch] = this.look.map((degrees) => {
      return Math.max(-LOOK_MOST, Math.min(LOOK_MOST, Math.trunc(degrees)));
    });
    this.look = [this.look[0] - yaw, this.look[1] - pitch];
    const ahead = axis("w", "s", this.thumb[1]);
    const aside = axis("d", "a", this.thumb[0]);
    this.ask({ ahead, aside, turn: axis("r", "l"), yaw, pitch });
  }
}
