// A photo that never becomes a file: it is read in the browser and travels as a data address, the component's value.
const zone = element.querySelector(".zone");
const input = zone.querySelector("input");
const shown = zone.querySelector("img");
const told = element.querySelector(".told");
const examples = element.querySelector(".examples");

const tell = (sentence) => {
  told.textContent = sentence;
  told.hidden = !sentence;
};
const show = () => {
  shown.hidden = !props.value;
  if (props.value) shown.src = props.value;
};
const send = (address) => {
  tell("");
  props.value = address;
  show();
  trigger("input");
};
const take = (file) => {
  if (!file) return;
  if (file.size > props.largest) {
    const [has, takes] = [file.size, props.largest].map((bytes) => Math.ceil(bytes / 1e6));
    tell(`The file has ${has} MB, the page takes ${takes}: send a smaller one.`);
    return;
  }
  const reader = new FileReader();
  reader.onload = () => send(reader.result);
  reader.onerror = () => tell("The browser cannot read this file.");
  reader.readAsDataURL(file);
};
const offer = () => {
  examples.replaceChildren(
    ...props.examples.map(({ name, address }) => {
      const button = document.createElement("button");
      const picture = document.createElement("img");
      picture.src = address;
      picture.alt = name;
      button.title = name;
      button.type = "button";
      button.append(picture);
      button.onclick = () => send(address);
      return button;
    }),
  );
};

shown.onerror = () => { shown.hidden = true; };
input.onchange = () => {
  take(input.files[0]);
  input.value = "";
};
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  zone.addEventListener(kind, (event) => {
    event.preventDefault();
    zone.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  take(files.find((file) => file.type.startsWith("image/")));
});
watch("value", show);
watch("examples", offer);
show();
offer();
