// The images of a message: chosen, pasted or dropped, shown as small squares, and kept as data URLs.

/**
 * An image, as a data URL.
 * @typedef {{name: string, url: string}} Picture
 */

/** An item of a list that shows an image. @param {Picture} picture */
export function thumbnail({ name, url }) {
  const [item, image] = [document.createElement("li"), document.createElement("img")];
  image.src = url;
  image.alt = image.title = name;
  item.append(image);
  return item;
}

/** The content of a file as a data URL. */
function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}

/** The images of the message that the user is writing. */
export class Pictures {
  /** Whether the model reads images. */
  allowed = false;
  /** @type {Picture[]} */
  #all = [];

  /**
   * @param {HTMLElement} list shows the images
   * @param {(message: string) => void} inform shows a message to the user; an empty one removes it
   */
  constructor(list, inform) {
    Object.assign(this, { list, inform });
  }

  /** Let the user choose, paste and drop images. */
  listen(button, chooser, prompt) {
    button.addEventListener("click", () => chooser.click());
    chooser.addEventListener("change", async () => {
      await this.add([...chooser.files]);
      chooser.value = ""; // the same file can be chosen again
    });
    prompt.addEventListener("paste", (event) => {
      const { files, types } = event.clipboardData;
      if (!files.length || types.includes("text/plain")) return; // a copied text may come with an image of itself
      event.preventDefault();
      this.add([...files]);
    });
    const over = (event, is) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault(); // else the browser opens the file instead of the page
      prompt.classList.toggle("dropping", is && this.allowed);
    };
    document.addEventListener("dragover", (event) => over(event, true));
    document.addEventListener("dragleave", (event) => over(event, event.relatedTarget !== null));
    document.addEventListener("drop", (event) => {
      over(event, false);
      if (event.dataTransfer.files.length) this.add([...event.dataTransfer.files]);
    });
  }

  async add(files) {
    this.inform(this.allowed ? "" : "This model reads text only.");
    for (const file of this.allowed ? files : []) {
      try {
        if (!file.type.startsWith("image/")) throw new Error("it is not an image");
        this.#all.push({ name: file.name, url: await dataUrl(file) });
      } catch (error) {
        this.inform(`${file.name} cannot be added: ${error.message}`);
      }
    }
    this.#draw();
  }

  /** Take all images out, to send them. */
  take() {
    const taken = this.#all;
    this.#all = [];
    this.#draw();
    return taken;
  }

  /** Undo {@link take}. */
  putBack(pictures) {
    this.#all.unshift(...pictures);
    this.#draw();
  }

  #draw() {
    this.list.replaceChildren(...this.#all.map((picture) => this.#removable(picture)));
    this.list.hidden = !this.#all.length;
  }

  #removable(picture) {
    const [item, button] = [thumbnail(picture), document.createElement("button")];
    button.type = "button";
    button.textContent = "×";
    button.ariaLabel = button.title = `Remove ${picture.name}`;
    button.addEventListener("click", () => {
      this.#all.splice(this.#all.indexOf(picture), 1);
      this.#draw();
    });
    item.append(button);
    return item;
  }
}
