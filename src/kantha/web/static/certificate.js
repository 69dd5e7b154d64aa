// Buttons of the certificate's page: print it, and make a PNG of the SVG. All texts are in the page.
"use strict";

const SCALE = 2; // points of the PNG for each one of the SVG

const picture = document.getElementById("certificate");
const printing = document.getElementById("print");
const png = document.getElementById("png");

async function save() {
  await picture.decode();
  const canvas = document.createElement("canvas");
  canvas.width = SCALE * picture.naturalWidth;
  canvas.height = SCALE * picture.naturalHeight;
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = png.dataset.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

printing.addEventListener("click", () => print());
png.addEventListener("click", save);
printing.hidden = png.hidden = false;
